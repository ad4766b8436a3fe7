"""A pytest plugin, `-p tests.support.simulated_cuda.plugin`: the tests of CUDA run on the simulation."""

from tests.support.simulated_cuda.install import install

install()
