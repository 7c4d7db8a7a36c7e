"""What an experiment found, shown: one page, TensorBoard, and two runs side by side. No torch."""
