// Clocks the array alone with random operands, through all of its modes; prints cycles, wall and processor seconds.
// Usage: array CYCLES ROWS_OR_COLUMNS
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "Vtop.h"
#include "verilated.h"

static uint64_t state = 88172645463325252ull;

template <class Port> static void randomize(Port& port) {
    auto* bytes = reinterpret_cast<unsigned char*>(&port);
    for (size_t k = 0; k < sizeof port; k += 4) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        std::memcpy(bytes + k, &state, 4);
    }
}

int main(int, char** argv) {
    const uint64_t cycles = std::strtoull(argv[1], nullptr, 0), size = std::strtoull(argv[2], nullptr, 0);
    Vtop top;
    const auto wall = std::chrono::steady_clock::now();
    const clock_t processor = std::clock();
    for (uint64_t t = 0; t < cycles; t++) {
        top.mode = t / 4096 % 3;
        top.boundary = t % (2 * size) == 2 * size - 1;
        top.shift = t % (2 * size) < size;
        randomize(top.left);
        randomize(top.left_weight);
        randomize(top.top);
        top.clk = 0, top.eval();
        top.clk = 1, top.eval();
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - wall;
    std::printf("%llu %.6f %.6f\n", static_cast<unsigned long long>(cycles), seconds.count(),
                double(std::clock() - processor) / CLOCKS_PER_SEC);
}
