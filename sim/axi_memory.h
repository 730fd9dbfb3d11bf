// AXI4 slave memory for the core's master port, one call before and one after every rising clock edge.
//
// Timing: a burst's first response comes `latency` cycles after its address (reads) or last data beat (writes)
// was accepted. Beats are limited by a credit of `read_rate`/`write_rate` bytes per cycle. Every channel may stall
// at random; a response once offered stays until taken, as AXI demands. Data of one direction is in order.
// Beats outside the memory are answered with DECERR, beats in the error range with SLVERR; neither is stored.
// The model also watches the master: illegal bursts, dropped or changing requests count as violations, and bursts
// that overlap a burst of the other direction still in flight count as hazards (real memories may reorder those).
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "control_layout.h"

template <class Top>
class AxiMemory {
public:
    static constexpr unsigned kBeat = sizeof(static_cast<Top*>(nullptr)->m_axi_wdata);
    static_assert(kBeat >= 8 && kBeat <= 64 && (kBeat & (kBeat - 1)) == 0, "data width must be 8 to 64 bytes");

    // `ring`: slots * slot_bytes for snapshots, or null when there is nothing to record.
    AxiMemory(Top& top, uint8_t* memory, uint64_t* control, uint8_t* ring)
        : top_(top), memory_(memory), control_(control), ring_(ring) {
        random_ = control[F_seed] * 0x9E3779B97F4A7C15ull + 0xD1B54A32D192ED03ull;
    }

    // Takes what the master offers in the cycle that ends with this edge.
    void sample(uint64_t cycle) {
        if (__builtin_expect(top_.rst, 0)) return reset();
        check_stable();
        if (top_.m_axi_arvalid && arready_) accept_read(cycle);
        if (top_.m_axi_awvalid && awready_) accept_write(cycle);
        if (top_.m_axi_wvalid && wready_) accept_data(cycle);
        if (rvalid_ && top_.m_axi_rready) finish_beat(cycle);
        if (bvalid_ && top_.m_axi_bready) { bvalid_ = false; write_head_++; }
    }

    // Sets the slave's outputs for the cycle that starts after this edge.
    void drive(uint64_t cycle) {
        const uint32_t limit = outstanding();
        uint64_t stalls = 0;
        if (const uint64_t stall = control_[F_stall]) {
            uint64_t draw = next_random();
            for (unsigned channel = 0; channel < 4; channel++, draw >>= 16)
                if ((draw & 0xFFFF) < stall) stalls |= 1u << channel;
            if ((next_random() & 0xFFFF) < stall) stalls |= 1u << kB;
        }
        arready_ = read_tail_ - read_head_ < limit && !(stalls >> kAR & 1);
        awready_ = write_tail_ - write_head_ < limit && !(stalls >> kAW & 1);
        const bool may_write = refill(write_credit_, control_[F_write_rate]);
        wready_ = data_head_ != write_tail_ && may_write && !(stalls >> kW & 1);
        if (!bvalid_ && write_head_ != data_head_ && !(stalls >> kB & 1)) {
            const Burst& burst = writes_[write_head_ % kQueue];
            if (cycle >= burst.ready) {
                bvalid_ = true;
                top_.m_axi_bid = burst.id;
                top_.m_axi_bresp = burst.response;
            }
        }
        const bool may_read = refill(read_credit_, control_[F_read_rate]);
        if (!rvalid_ && read_head_ != read_tail_ && may_read && !(stalls >> kR & 1)) {
            const Burst& burst = reads_[read_head_ % kQueue];
            if (cycle >= burst.ready) offer_beat(burst);
        }
        top_.m_axi_arready = arready_;
        top_.m_axi_awready = awready_;
        top_.m_axi_wready = wready_;
        top_.m_axi_bvalid = bvalid_;
        top_.m_axi_rvalid = rvalid_;
    }

private:
    enum Channel { kAR, kAW, kR, kW, kB };
    enum Response : uint8_t { kOkay = 0, kSlaveError = 2, kDecodeError = 3 };
    static constexpr unsigned kQueue = 256;

    struct Burst {
        uint64_t address;   // of the next beat
        uint64_t first;     // of the first beat
        uint64_t ready;     // earliest cycle of the response
        uint32_t beats;     // still to transfer
        uint32_t length;
        uint8_t id;
        uint8_t response;
    };

    uint32_t outstanding() const {
        const uint64_t limit = control_[F_outstanding];
        return limit < 1 ? 1 : limit > kQueue - 1 ? kQueue - 1 : static_cast<uint32_t>(limit);
    }
    uint64_t latency() const { return control_[F_latency] < 1 ? 1 : control_[F_latency]; }

    // Adds one cycle's bytes to a credit that holds two beats at most; true when one beat may pass.
    static bool refill(uint64_t& credit, uint64_t rate) {
        if (rate == 0) { credit = 2 * kBeat; return true; }
        const uint64_t most = kBeat + (rate > kBeat ? rate : kBeat);
        credit = credit + rate > most ? most : credit + rate;
        return credit >= kBeat;
    }

    uint64_t next_random() {  // xorshift64*
        random_ ^= random_ >> 12;
        random_ ^= random_ << 25;
        random_ ^= random_ >> 27;
        return random_ * 0x2545F4914F6CDD1Dull;
    }

    void reset() {
        read_head_ = read_tail_ = write_head_ = data_head_ = write_tail_ = 0;
        arready_ = awready_ = wready_ = rvalid_ = bvalid_ = false;
        ar_waits_ = aw_waits_ = w_waits_ = false;
    }

    uint8_t response_at(uint64_t address) const {
        if (address + kBeat > control_[F_memory_bytes]) return kDecodeError;
        const uint64_t size = control_[F_error_bytes];
        const uint64_t first = control_[F_error_first];
        if (size && address < first + size && first < address + kBeat) return kSlaveError;
        return kOkay;
    }

    void accept_read(uint64_t cycle) {
        Burst burst = check_burst("read", top_.m_axi_araddr, top_.m_axi_arlen, top_.m_axi_arsize, top_.m_axi_arburst,
                                  cycle);
        burst.id = top_.m_axi_arid;
        burst.ready = cycle + latency();
        for (uint32_t i = write_head_; i != write_tail_; i++) note_overlap(burst, writes_[i % kQueue]);
        reads_[read_tail_++ % kQueue] = burst;
        control_[F_read_bursts]++;
    }

    void accept_write(uint64_t cycle) {
        Burst burst = check_burst("write", top_.m_axi_awaddr, top_.m_axi_awlen, top_.m_axi_awsize,
                                  top_.m_axi_awburst, cycle);
        burst.id = top_.m_axi_awid;
        for (uint32_t i = read_head_; i != read_tail_; i++) note_overlap(burst, reads_[i % kQueue]);
        writes_[write_tail_++ % kQueue] = burst;
        control_[F_write_bursts]++;
    }

    void accept_data(uint64_t cycle) {
        Burst& burst = writes_[data_head_ % kQueue];
        const uint64_t strobe = top_.m_axi_wstrb;
        const uint8_t response = response_at(burst.address);
        if (response == kOkay) {
            store(burst.address, strobe);
            const uint64_t step = control_[F_step_address];
            if (__builtin_expect(step - burst.address < kBeat, 0) && (strobe >> (step - burst.address) & 1))
                step_done(cycle, step);
        } else if (response > burst.response) {
            burst.response = response;
        }
        const bool last = --burst.beats == 0;
        if (last != static_cast<bool>(top_.m_axi_wlast))
            violation(cycle, "WLAST is %d on beat %u of %u of the write burst at 0x%llx", top_.m_axi_wlast,
                      burst.length - burst.beats, burst.length, static_cast<unsigned long long>(burst.first));
        burst.address += kBeat;
        if (last) {
            burst.ready = cycle + latency();
            data_head_++;
        }
        write_credit_ -= kBeat;
        control_[F_write_beats]++;
        control_[F_last_beat] = cycle;
    }

    void store(uint64_t address, uint64_t strobe) {
        const uint8_t* const data = reinterpret_cast<const uint8_t*>(&top_.m_axi_wdata);
        constexpr uint64_t kAll = kBeat == 64 ? ~0ull : (1ull << kBeat % 64) - 1;
        if (__builtin_expect(strobe == kAll, 1)) {
            std::memcpy(memory_ + address, data, kBeat);
            return;
        }
        for (uint64_t rest = strobe; rest; rest &= rest - 1) {
            const unsigned byte = __builtin_ctzll(rest);
            memory_[address + byte] = data[byte];
        }
    }

    void* read_data() { return &top_.m_axi_rdata; }

    void offer_beat(const Burst& burst) {
        const uint8_t response = response_at(burst.address);
        if (response == kOkay)
            std::memcpy(read_data(), memory_ + burst.address, kBeat);
        else
            std::memset(read_data(), 0xA5, kBeat);
        top_.m_axi_rid = burst.id;
        top_.m_axi_rresp = response;
        top_.m_axi_rlast = burst.beats == 1;
        rvalid_ = true;
    }

    void finish_beat(uint64_t cycle) {
        Burst& burst = reads_[read_head_ % kQueue];
        rvalid_ = false;
        burst.address += kBeat;
        if (--burst.beats == 0) read_head_++;
        read_credit_ -= kBeat;
        control_[F_read_beats]++;
        control_[F_last_beat] = cycle;
    }

    Burst check_burst(const char* kind, uint64_t address, unsigned length, unsigned size, unsigned type,
                      uint64_t cycle) {
        const unsigned beats = length + 1;
        const auto at = static_cast<unsigned long long>(address);
        if ((1u << size) != kBeat)
            violation(cycle, "%s burst at 0x%llx: SIZE %u is not the full beat of %u bytes", kind, at, size, kBeat);
        if (type != 1) violation(cycle, "%s burst at 0x%llx: BURST %u is not INCR", kind, at, type);
        if (address % kBeat)
            violation(cycle, "%s burst at 0x%llx is not aligned to its beat of %u bytes", kind, at, kBeat);
        if (address / 4096 != (address + static_cast<uint64_t>(beats) * kBeat - 1) / 4096)
            violation(cycle, "%s burst at 0x%llx of %u beats crosses a 4 KB boundary", kind, at, beats);
        Burst burst{};
        burst.address = burst.first = address / kBeat * kBeat;
        burst.beats = burst.length = beats;
        return burst;
    }

    void note_overlap(const Burst& a, const Burst& b) {
        if (a.first < b.first + static_cast<uint64_t>(b.length) * kBeat &&
            b.first < a.first + static_cast<uint64_t>(a.length) * kBeat && control_[F_hazards]++ == 0)
            control_[F_hazard_address] = a.first;
    }

    // A request that was not taken must be offered again unchanged (AXI4 A3.2.1).
    void check_stable() {
        hold("AR", ar_waits_, top_.m_axi_arvalid, ar_, request(top_.m_axi_araddr, top_.m_axi_arlen, top_.m_axi_arid));
        hold("AW", aw_waits_, top_.m_axi_awvalid, aw_, request(top_.m_axi_awaddr, top_.m_axi_awlen, top_.m_axi_awid));
        if (w_waits_) {
            if (!top_.m_axi_wvalid)
                violation(0, "WVALID fell before WREADY");
            else if (std::memcmp(w_data_, &top_.m_axi_wdata, kBeat) || w_strobe_ != top_.m_axi_wstrb)
                violation(0, "the data or strobe of a waiting W beat changed");
        }
        ar_waits_ = top_.m_axi_arvalid && !arready_;
        aw_waits_ = top_.m_axi_awvalid && !awready_;
        w_waits_ = top_.m_axi_wvalid && !wready_;
        if (w_waits_) {
            std::memcpy(w_data_, &top_.m_axi_wdata, kBeat);
            w_strobe_ = top_.m_axi_wstrb;
        }
    }
    static uint64_t request(uint64_t address, uint64_t length, uint64_t id) {
        return address | length << 32 | id << 40;
    }
    void hold(const char* channel, bool waits, bool valid, uint64_t& before, uint64_t now) {
        if (waits && !valid)
            violation(0, "%sVALID fell before %sREADY", channel, channel);
        else if (waits && before != now)
            violation(0, "the payload of a waiting %s request changed", channel);
        before = now;
    }

    __attribute__((format(printf, 3, 4))) void violation(uint64_t cycle, const char* format, ...) {
        if (control_[F_violations]++) return;
        char* const text = reinterpret_cast<char*>(control_ + kHeaderWords);
        int used = std::snprintf(text, kMessageBytes, "cycle %llu: ",
                                 static_cast<unsigned long long>(cycle ? cycle : control_[F_cycle]));
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(text + used, kMessageBytes - used, format, arguments);
        va_end(arguments);
    }

    void step_done(uint64_t cycle, uint64_t address);

    Top& top_;
    uint8_t* const memory_;
    uint64_t* const control_;
    uint8_t* const ring_;
    uint64_t random_;
    Burst reads_[kQueue], writes_[kQueue];
    uint32_t read_head_ = 0, read_tail_ = 0;
    uint32_t write_head_ = 0, data_head_ = 0, write_tail_ = 0;  // answered <= filled <= accepted
    uint64_t read_credit_ = 0, write_credit_ = 0;
    bool arready_ = false, awready_ = false, wready_ = false, rvalid_ = false, bvalid_ = false;
    bool ar_waits_ = false, aw_waits_ = false, w_waits_ = false;
    uint64_t ar_ = 0, aw_ = 0, w_strobe_ = 0;
    uint8_t w_data_[kBeat];
};

bool wait_for_reader(uint64_t* control);

// Copies the configured regions into the next ring slot: the state of memory at the end of one training step.
template <class Top>
void AxiMemory<Top>::step_done(uint64_t cycle, uint64_t address) {
    const uint64_t step = control_[F_steps]++;
    const uint64_t slots = control_[F_slots];
    if (!ring_ || slots == 0) return;
    const uint64_t head = control_[F_ring_head];
    if (head - control_[F_ring_tail] >= slots && !(control_[F_ring_blocks] && wait_for_reader(control_))) {
        control_[F_ring_dropped]++;
        return;
    }
    uint8_t* const slot = ring_ + head % slots * control_[F_slot_bytes];
    uint32_t value = 0;
    std::memcpy(&value, memory_ + address, sizeof value);
    const uint64_t header[kSlotHeaderWords] = {step, cycle, control_[F_read_beats], control_[F_write_beats] + 1,
                                               control_[F_interrupts], value, 0, 0};
    std::memcpy(slot, header, sizeof header);
    uint8_t* target = slot + sizeof header;
    const uint64_t* region = control_ + kHeaderWords + kMessageBytes / 8;
    for (uint64_t i = 0; i < control_[F_regions]; i++, region += 2) {
        if (region[0] + region[1] <= control_[F_memory_bytes]) std::memcpy(target, memory_ + region[0], region[1]);
        target += region[1];
    }
    __atomic_store_n(&control_[F_ring_head], head + 1, __ATOMIC_RELEASE);
}
