"""Amaranth RTL of the training core: configuration, program format, units, and Verilog generation."""
