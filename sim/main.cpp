// Clock and memory loop of the simulated core.
//
// With cocotb (default): the loop toggles the clock, serves the AXI master from a memory in this process, and runs
// cocotb's callbacks on every edge only while Python is awake. When Python sleeps (control word `sleep`), nothing
// of VPI runs until the interrupt pin changes or Python's next timer is due.
// With INTRAIN_BARE: no VPI; register accesses come from a script, so that the speed of the bare model can be seen.
//
// Files of the run folder (environment INTRAIN_RUN_DIR), all shared memory: control.bin, memory.bin, and, when
// snapshots are configured, snapshots.bin; activity.bin counts cycles by engine, tag and activity.
// The clock period is two time units: cycle c rises at time 2 c - 1.

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <string>
#include <type_traits>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "Vtop.h"
#include "axi_memory.h"
#include "verilated.h"
#ifndef INTRAIN_BARE
#include "verilated_vpi.h"
#endif
#if VM_TRACE
#include "verilated_fst_c.h"
#endif

#ifndef INTRAIN_BARE
extern "C" void vlog_startup_routines_bootstrap(void);
#endif

static uint64_t now_ = 0;
double sc_time_stamp() { return static_cast<double>(now_); }

[[noreturn]] static void fail(const std::string& what) {
    std::fprintf(stderr, "simulation: error: %s\n", what.c_str());
    std::exit(2);
}

static void* map_file(const std::string& path, size_t& size, bool required) {
    const int file = open(path.c_str(), O_RDWR);
    if (file < 0) {
        if (!required) return nullptr;
        fail("cannot open " + path + "; start the simulation through sim.session");
    }
    struct stat status;
    if (fstat(file, &status)) fail("cannot read the size of " + path);
    size = static_cast<size_t>(status.st_size);
    void* const view = size ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : nullptr;
    close(file);
    if (view == MAP_FAILED) fail("cannot map " + path);
    return view;
}

// Waits until the reader has freed a ring slot; false when the reader is gone or asked to stop.
bool wait_for_reader(uint64_t* control) {
    for (uint64_t round = 0;; round++) {
        if (__atomic_load_n(&control[F_ring_head], __ATOMIC_ACQUIRE) -
                __atomic_load_n(&control[F_ring_tail], __ATOMIC_ACQUIRE) < control[F_slots])
            return true;
        if (__atomic_load_n(&control[F_stop], __ATOMIC_RELAXED) >= 2) return false;
        if (round % 1024 == 1023 && control[F_parent] && kill(static_cast<pid_t>(control[F_parent]), 0)) return false;
        usleep(200);
    }
}

// Counts cycles by (engine, tag, activity) from the core's trace outputs, and keeps when an engine turns to another tag
// or to idleness (activity 0) until the event list is full; nothing for a top level without these outputs.
template <class Top, class = void>
struct Activity {
    static void count(const Top&, uint64_t*, uint64_t) {}
};
template <class Top>
struct Activity<Top, std::void_t<decltype(std::declval<Top&>().trace_product)>> {
    static void count(const Top& top, uint64_t* counts, uint64_t cycle) {
        one(0, top.trace_product_tag, top.trace_product, counts, cycle);
        one(1, top.trace_vector_tag, top.trace_vector, counts, cycle);
    }

private:
    static void one(unsigned engine, unsigned tag, unsigned activity, uint64_t* counts, uint64_t cycle) {
        static uint64_t last[2] = {0, 0};
        counts[(engine * kTags + tag % kTags) * kActivities + activity]++;
        const uint64_t now = activity ? 1 + tag : 0;
        if (__builtin_expect(now == last[engine], 1)) return;
        last[engine] = now;
        uint64_t* const events = counts + 2 * kTags * kActivities;
        if (events[0] < kEvents) events[++events[0]] = cycle << 20 | engine << 19 | now;
    }
};

class Simulation {
public:
    explicit Simulation(const std::string& folder) {
        size_t size = 0;
        control_ = static_cast<uint64_t*>(map_file(folder + "/control.bin", size, true));
        if (size != kControlBytes) fail(folder + "/control.bin is of another version of this program");
        auto* const memory = static_cast<uint8_t*>(map_file(folder + "/memory.bin", size, true));
        bytes_ = memory;
        if (size < control_[F_memory_bytes]) fail(folder + "/memory.bin is shorter than the configured memory");
        uint8_t* const ring = static_cast<uint8_t*>(map_file(folder + "/snapshots.bin", size, false));
        if (ring && size < control_[F_slots] * control_[F_slot_bytes])
            fail(folder + "/snapshots.bin is shorter than the configured ring");
#if VM_TRACE
        Verilated::traceEverOn(true);
#endif
        top_ = std::make_unique<Vtop>("");
        memory_ = std::make_unique<AxiMemory<Vtop>>(*top_, memory, control_, ring);
        activity_ = static_cast<uint64_t*>(map_file(folder + "/activity.bin", size, true));
        if (size != kActivityBytes) fail(folder + "/activity.bin has the wrong size");
        external_ = control_[F_external_memory];
        control_[F_pid] = static_cast<uint64_t>(getpid());
        control_[F_beat_bytes] = AxiMemory<Vtop>::kBeat;
#if VM_TRACE
        if (control_[F_trace_last]) {
            trace_ = std::make_unique<VerilatedFstC>();
            top_->trace(trace_.get(), 99);
            trace_->open((folder + "/waves.fst").c_str());
        }
#else
        if (control_[F_trace_last]) fail("this build has no waveforms; use the debug flavour");
#endif
    }

    ~Simulation() {
        flush();
        top_->final();
#if VM_TRACE
        if (trace_) trace_->close();
#endif
    }

    int run_script(const char* path, const char* data);
#ifndef INTRAIN_BARE
    int run_cocotb();
#endif

private:
    enum Wake { kDeadline, kInterrupt, kEnd };

    uint64_t asked(Field field) const { return __atomic_load_n(&control_[field], __ATOMIC_RELAXED); }
    void flush() { __atomic_store_n(&control_[F_cycle], cycle_, __ATOMIC_RELAXED); }

    // Someone wants the end, the parent is gone, or the limit is reached.
    bool poll() {
        flush();
        if ((cycle_ & 1023) == 0) note_time();
        if (Verilated::gotFinish() || asked(F_stop) >= 2) return true;
        if (control_[F_parent] && kill(static_cast<pid_t>(control_[F_parent]), 0)) return true;
        if (control_[F_cycle_limit] && cycle_ >= control_[F_cycle_limit]) {
            std::fprintf(stderr, "simulation: the limit of %llu cycles is reached\n",
                         static_cast<unsigned long long>(cycle_));
            return true;
        }
        return false;
    }

    static uint64_t nanoseconds_since(std::chrono::steady_clock::time_point start) {
        const std::chrono::nanoseconds spent = std::chrono::steady_clock::now() - start;
        return static_cast<uint64_t>(spent.count());
    }

    void note_time() {
        control_[F_wall_nanoseconds] = nanoseconds_since(start_);
        control_[F_cpu_nanoseconds] = cpu_nanoseconds() - cpu_start_;
    }
    static uint64_t cpu_nanoseconds() {
        timespec spent{};
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
        return static_cast<uint64_t>(spent.tv_sec) * 1000000000u + static_cast<uint64_t>(spent.tv_nsec);
    }

    void clock_high() {
        if (__builtin_expect(cycle_ == 0, 0)) {
            start_ = std::chrono::steady_clock::now();
            cpu_start_ = cpu_nanoseconds();
        }
        if (!external_) memory_->sample(cycle_);
        Activity<Vtop>::count(*top_, activity_, cycle_);
        top_->eval();
        cycle_++;
        if (!external_) memory_->drive(cycle_);
    }

    bool interrupt_changed() {
        if (__builtin_expect(top_->irq == irq_, 1)) return false;
        irq_ = top_->irq;
        if (irq_) control_[F_interrupts]++;
        return true;
    }

    void end_slot() {
#if VM_TRACE
        if (trace_ && cycle_ >= control_[F_trace_first] && cycle_ <= control_[F_trace_last]) trace_->dump(now_);
#endif
        now_++;
    }

    // Whole cycles without any callback, from a low clock, until the next time slot would be `deadline`, the interrupt
    // pin changes (then the clock is high and its slot unfinished), or poll() says so.
    Wake run(uint64_t deadline) {
        const auto start = std::chrono::steady_clock::now();
        const uint64_t first = cycle_;
        Wake wake = kDeadline;
        while (now_ + 2 <= deadline) {
            top_->clk = 1;
            clock_high();
            if (__builtin_expect(interrupt_changed(), 0)) { wake = kInterrupt; break; }
            end_slot();
            top_->clk = 0;
            top_->eval();
            end_slot();
            if (__builtin_expect((cycle_ & 1023) == 0, 0) && poll()) { wake = kEnd; break; }
        }
        control_[F_loop_nanoseconds] += nanoseconds_since(start);
        note_time();
        control_[F_loop_cycles] += cycle_ - first;
        flush();
        return wake;
    }

#ifndef INTRAIN_BARE
    static void settle_values() {
        while (VerilatedVpi::callValueCbs()) {}
    }

    // Evaluates until neither Python's writes nor its value callbacks ask for more.
    void settle() {
        do {
            do {
                top_->eval_step();
                VerilatedVpi::clearEvalNeeded();
                VerilatedVpi::doInertialPuts();
                settle_values();
            } while (VerilatedVpi::evalNeeded());
            VerilatedVpi::callCbs(cbReadWriteSynch);
            VerilatedVpi::doInertialPuts();
            settle_values();
        } while (VerilatedVpi::evalNeeded());
        top_->eval_end_step();
        VerilatedVpi::callCbs(cbReadOnlySynch);
        interrupt_changed();
    }

    // What Python has for the start of a time slot; its writes take effect before the clock moves.
    void begin_slot() {
        VerilatedVpi::callCbs(cbNextSimTime);
        settle_values();
        VerilatedVpi::callTimedCbs();
        settle_values();
        VerilatedVpi::doInertialPuts();
        if (VerilatedVpi::evalNeeded()) top_->eval_step();
    }
#else
    void finish_cycle() {  // of a run that the interrupt pin ended
        if (!top_->clk) return;
        end_slot();
        top_->clk = 0;
        top_->eval();
        end_slot();
    }
    bool lite(bool write, uint32_t address, uint32_t& data);
#endif

    uint64_t* control_;
    uint8_t* bytes_;  // the memory
    uint64_t* activity_;
    std::unique_ptr<Vtop> top_;
    std::unique_ptr<AxiMemory<Vtop>> memory_;
#if VM_TRACE
    std::unique_ptr<VerilatedFstC> trace_;
#endif
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
    uint64_t cpu_start_ = 0;
    uint64_t cycle_ = 0;
    uint8_t irq_ = 0;
    bool external_ = false;
};

#ifndef INTRAIN_BARE

int Simulation::run_cocotb() {
    Verilated::fatalOnVpiError(false);
    vlog_startup_routines_bootstrap();
    VerilatedVpi::callCbs(cbStartOfSimulation);
    settle_values();
    settle();
    end_slot();
    while (!poll()) {
        begin_slot();
        if (!top_->clk && asked(F_sleep)) {
            const Wake wake = run(VerilatedVpi::cbNextDeadline());
            control_[F_sleep] = 0;
            if (wake == kEnd) break;
            if (wake == kInterrupt) {
                settle();
                end_slot();
            }
            continue;
        }
        top_->clk = !top_->clk;
        settle_values();  // before the evaluation: a trigger on the edge sees the values in front of it
        if (top_->clk) clock_high();
        settle();
        end_slot();
    }
    VerilatedVpi::callCbs(cbEndOfSimulation);
    return Verilated::threadContextp()->errorCount() > 0;
}

#else

// One AXI4-Lite access with at most 1000 cycles; false when the core does not answer.
bool Simulation::lite(bool write, uint32_t address, uint32_t& data) {
    Vtop& top = *top_;
    if (write) {
        top.s_axi_awaddr = address;
        top.s_axi_wdata = data;
        top.s_axi_wstrb = 15;
        top.s_axi_awvalid = top.s_axi_wvalid = top.s_axi_bready = 1;
    } else {
        top.s_axi_araddr = address;
        top.s_axi_arvalid = top.s_axi_rready = 1;
    }
    top.eval();
    for (int wait = 0; wait < 1000; wait++) {
        const bool aw = top.s_axi_awready, w = top.s_axi_wready, ar = top.s_axi_arready;
        const bool done = write ? top.s_axi_bvalid && top.s_axi_bready : top.s_axi_rvalid && top.s_axi_rready;
        if (done && !write) data = top.s_axi_rdata;
        run(now_ + 2);
        finish_cycle();
        if (aw) top.s_axi_awvalid = 0;
        if (w) top.s_axi_wvalid = 0;
        if (ar) top.s_axi_arvalid = 0;
        if (done) {
            top.s_axi_bready = top.s_axi_rready = 0;
            top.eval();
            return true;
        }
        top.eval();
    }
    return false;
}

// Script lines: `reset CYCLES`, `write ADDRESS VALUE`, `read ADDRESS` (printed), `interrupt LIMIT`, and
// `load ADDRESS OFFSET BYTES`, which copies a piece of the file `data` to memory.
int Simulation::run_script(const char* path, const char* data) {
    FILE* const script = std::fopen(path, "r");
    if (!script) fail(std::string("cannot open the script ") + path);
    size_t data_size = 0;
    const auto* const pieces = data ? static_cast<const uint8_t*>(map_file(data, data_size, true)) : nullptr;
    top_->eval();
    char verb[32];
    while (std::fscanf(script, "%31s", verb) == 1) {
        unsigned long long first = 0;
        uint32_t value = 0;
        const std::string word = verb;
        if (std::fscanf(script, "%lli", reinterpret_cast<long long*>(&first)) != 1) fail("no number after " + word);
        if (word == "load") {
            unsigned long long from = 0, count = 0;
            if (std::fscanf(script, "%llu %llu", &from, &count) != 2) fail("no offset and size after load");
            if (from + count > data_size || first + count > control_[F_memory_bytes]) fail("load outside a file");
            std::memcpy(bytes_ + first, pieces + from, count);
        } else if (word == "reset") {
            top_->rst = 1;
            run(now_ + 2 * first);
            top_->rst = 0;
            top_->eval();
        } else if (word == "write") {
            if (std::fscanf(script, "%i", reinterpret_cast<int*>(&value)) != 1) fail("no value after write");
            if (!lite(true, static_cast<uint32_t>(first), value)) fail("no answer to a register write");
        } else if (word == "read") {
            if (!lite(false, static_cast<uint32_t>(first), value)) fail("no answer to a register read");
            std::printf("0x%03llx 0x%08x\n", first, value);
        } else if (word == "interrupt") {
            if (!irq_ && run(now_ + 2 * first) != kInterrupt) fail("no interrupt within the limit");
            finish_cycle();
        } else {
            fail("unknown script word " + word);
        }
    }
    std::fclose(script);
    return 0;
}

#endif

int main(int argc, char** argv) {
    std::signal(SIGINT, SIG_IGN);  // the parent decides what an interrupt key means
    Verilated::commandArgs(argc, argv);
    const char* const folder = std::getenv("INTRAIN_RUN_DIR");
    if (!folder) fail("INTRAIN_RUN_DIR is not set; start the simulation through sim.session");
    Simulation simulation(folder);
#ifdef INTRAIN_BARE
    if (argc < 2) fail("usage: intrain SCRIPT [DATA]");
    return simulation.run_script(argv[1], argc > 2 ? argv[2] : nullptr);
#else
    return simulation.run_cocotb();
#endif
}
