"""Products with a Gaussian kernel matrix in sub-quadratic time, with an error that is measured."""
