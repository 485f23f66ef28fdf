# benchmark::benchmark: the system's library.
find_package(benchmark 1.7 REQUIRED)  # apt-get install libbenchmark-dev
