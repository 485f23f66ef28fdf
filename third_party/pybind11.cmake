# pybind11::module of the Python package `pybind11`, which pip installs; Python3_EXECUTABLE says of which interpreter.
find_package(Python3 COMPONENTS Interpreter Development.Module REQUIRED)
execute_process(COMMAND ${Python3_EXECUTABLE} -m pybind11 --cmakedir OUTPUT_VARIABLE dhsa_pybind11_dir
                OUTPUT_STRIP_TRAILING_WHITESPACE)
find_package(pybind11 2.11 REQUIRED CONFIG PATHS ${dhsa_pybind11_dir} NO_DEFAULT_PATH)
