"""The library in other people's trainers: a folder for each, which imports it. Nothing else here imports these."""
