// The two functions of zlib that Verilator's FST writer calls, so that waveforms need no system package.
// The data is stored, not compressed (RFC 1950 header, RFC 1951 stored blocks); the writer keeps whatever is smaller.
#pragma once

#include <cstdint>
#include <cstring>

using Bytef = unsigned char;
using uLong = unsigned long;
using uLongf = unsigned long;
enum { Z_OK = 0, Z_BUF_ERROR = -5 };

static inline uLong compressBound(uLong size) { return size + 5 * (size / 65535 + 1) + 6; }

static inline int compress2(Bytef* target, uLongf* target_size, const Bytef* source, uLong size, int) {
    if (*target_size < compressBound(size)) return Z_BUF_ERROR;
    Bytef* out = target;
    *out++ = 0x78;
    *out++ = 0x01;
    uLong at = 0;
    do {
        const uLong count = size - at < 65535 ? size - at : 65535;
        *out++ = at + count == size;
        *out++ = static_cast<Bytef>(count);
        *out++ = static_cast<Bytef>(count >> 8);
        *out++ = static_cast<Bytef>(~count);
        *out++ = static_cast<Bytef>(~count >> 8);
        std::memcpy(out, source + at, count);
        out += count;
        at += count;
    } while (at < size);
    uint32_t low = 1, high = 0;  // Adler-32
    for (uLong i = 0; i < size; i++) {
        low = (low + source[i]) % 65521;
        high = (high + low) % 65521;
    }
    for (const uint32_t half : {high, low}) {
        *out++ = static_cast<Bytef>(half >> 8);
        *out++ = static_cast<Bytef>(half);
    }
    *target_size = static_cast<uLongf>(out - target);
    return Z_OK;
}
