"""The library in other people's trainers: one module for each, which imports it. Nothing else here imports these."""
