"""Where traces come from: recordings of engines and trainers, packing, synthetic routing."""
