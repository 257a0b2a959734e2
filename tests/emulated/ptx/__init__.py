"""nvcc's PTX on the host: a parser, a translator to C++ for the fiber scheduler, and a lint."""
