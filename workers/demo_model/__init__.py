"""The demo's tiny base model, its benchmarks, general rows and domains, all made on the spot."""
