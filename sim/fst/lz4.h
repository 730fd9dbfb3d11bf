// The two functions of liblz4 that Verilator's FST writer calls, so that waveforms need no system package.
// A greedy encoder of the LZ4 block format: tokens of (literal run, match of 4 bytes or more at most 65535 back).
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

static inline int LZ4_compressBound(int size) { return size + size / 255 + 16; }

static inline uint8_t* lz4_length(uint8_t* out, int length) {  // what exceeds the 15 of a token's nibble
    for (length -= 15; length >= 255; length -= 255) *out++ = 255;
    *out++ = static_cast<uint8_t>(length);
    return out;
}

static inline int LZ4_compress_default(const char* source, char* target, int size, int capacity) {
    if (capacity < LZ4_compressBound(size)) return 0;
    const auto* const in = reinterpret_cast<const uint8_t*>(source);
    auto* out = reinterpret_cast<uint8_t*>(target);
    std::vector<int> seen(1 << 13, -1);
    int anchor = 0;
    // The format ends with at least five literals and starts no match in the last twelve bytes.
    for (int at = 0; at + 12 <= size;) {
        uint32_t word;
        std::memcpy(&word, in + at, 4);
        int& slot = seen[word * 2654435761u >> 19];
        const int match = slot;
        slot = at;
        if (match < 0 || at - match > 65535 || std::memcmp(in + match, in + at, 4)) {
            at++;
            continue;
        }
        int length = 4;
        while (at + length < size - 5 && in[match + length] == in[at + length]) length++;
        const int literals = at - anchor;
        *out++ = static_cast<uint8_t>((literals < 15 ? literals : 15) << 4 | (length - 4 < 15 ? length - 4 : 15));
        if (literals >= 15) out = lz4_length(out, literals);
        std::memcpy(out, in + anchor, literals);
        out += literals;
        *out++ = static_cast<uint8_t>(at - match);
        *out++ = static_cast<uint8_t>((at - match) >> 8);
        if (length - 4 >= 15) out = lz4_length(out, length - 4);
        anchor = at += length;
    }
    const int literals = size - anchor;
    *out++ = static_cast<uint8_t>((literals < 15 ? literals : 15) << 4);
    if (literals >= 15) out = lz4_length(out, literals);
    std::memcpy(out, in + anchor, literals);
    return static_cast<int>(out + literals - reinterpret_cast<uint8_t*>(target));
}
