// A check of the host tests: counts itself, and ends the program with a message where it fails.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>

static int64_t checks = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    ++checks;                                                     \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      std::exit(1);                                               \
    }                                                             \
  } while (0)
