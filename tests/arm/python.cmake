# CMake's view of a build under an emulated ARM64 Python (tests/run_arm_python.sh): cmake and the compilers are this
# machine's own, what they make is the emulated one's. CC and CXX name the cross compilers, ARM_ROOT the ARM64 system.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CROSSCOMPILING_EMULATOR env)  # Python's path names a script that starts the emulator
set(CMAKE_CXX_FLAGS_INIT "-idirafter $ENV{ARM_ROOT}/usr/include")  # pyconfig.h includes one for each machine
set(Python3_INCLUDE_DIR "$ENV{ARM_ROOT}/usr/include/python3.11" CACHE PATH "Found by no search, since it is not CMake's own system")
