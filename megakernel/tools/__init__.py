"""Looking into launches and compiled kernels; nothing here is needed to run the layer."""
