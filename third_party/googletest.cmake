# GTest::gtest: the system's library, or its sources where the target is another machine.
set(DHSA_GTEST_SOURCES /usr/src/googletest/googletest CACHE PATH "GoogleTest's sources, read when cross-compiling")

if(CMAKE_CROSSCOMPILING)
  if(NOT EXISTS ${DHSA_GTEST_SOURCES}/src/gtest-all.cc)
    message(FATAL_ERROR "DHSA_GTEST_SOURCES: expected GoogleTest's sources (apt-get install googletest), "
                        "got ${DHSA_GTEST_SOURCES}")
  endif()
  find_package(Threads REQUIRED)
  add_library(dhsa_gtest STATIC ${DHSA_GTEST_SOURCES}/src/gtest-all.cc)
  target_include_directories(dhsa_gtest PRIVATE ${DHSA_GTEST_SOURCES})
  target_include_directories(dhsa_gtest SYSTEM PUBLIC ${DHSA_GTEST_SOURCES}/include)
  target_compile_options(dhsa_gtest PRIVATE -O1)
  target_link_libraries(dhsa_gtest PUBLIC Threads::Threads)
  add_library(GTest::gtest ALIAS dhsa_gtest)
else()
  find_package(GTest 1.12 REQUIRED)  # apt-get install libgtest-dev
endif()
