"""The readers that `benchmarks.fuzz_readers` tries: seeds, mutations and calls."""
