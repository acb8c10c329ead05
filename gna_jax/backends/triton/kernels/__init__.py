"""The kernels, in Triton. Importing any of these modules imports Triton."""
