// Prints what runs, then runs it. --isas prints the ISAs that this machine can run, one a line, and ends.
// DHSA_FORCE_ISA that names one which the machine lacks ends the run with status 2.
#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "support.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc > 1 && std::string(argv[1]) == "--isas") {
    std::string isas = dhsa::cpu::isas_detected();
    std::replace(isas.begin(), isas.end(), ',', '\n');
    std::puts(isas.c_str());
    return 0;
  }
  try {
    std::printf("ISA compiled: %s; detected: %s; active: %s; DHSA_TEST_SEED=%llu\n", dhsa::cpu::isas_compiled(),
                dhsa::cpu::isas_detected(), dhsa::cpu::isa_active(),
                static_cast<unsigned long long>(dhsa::test::seed()));
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  return RUN_ALL_TESTS();
}
