"""Co-simulation: compiler from network to program, Verilator build, cocotb run, comparison and report."""
