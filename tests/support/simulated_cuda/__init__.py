"""A simulated CUDA: two devices on a CPU build of PyTorch, to find what would go wrong on a GPU.

    python -m pytest -p tests.support.simulated_cuda.plugin -k cuda tests/runtime
    from tests.support.simulated_cuda.install import install; install()      # before anything asks for CUDA

Tensors lie in host memory, but their *storage* bears a label, "cuda:0" or "cuda:1", and so do all views of it.
`tensor.device`, `.is_cuda`, `.to()`, `.cpu()`, factories with `device="cuda"`, fake tensors and exported graphs
go by the label. `torch.cuda` has streams, events, graphs and two devices. Refused, as by CUDA, are

* tensors of two devices in one operator, and `.numpy()` of a labelled tensor;
* a read or write on one stream of what another one wrote, without an event between them, and memory freed on its
  own stream while another still uses it, without `record_stream`: a race, noted in `FINDINGS`;
* in a capture: `.item()`, `nonzero`, boolean indexes, `equal`, copies between devices, synchronisation, work on
  a forked stream that is never joined, a compiler that starts, an AccumulateGrad node of the default stream.

A captured graph is a list of operators on fixed storages. A capture computes nothing: what it wrote outside its
pool is put back, and what it made cannot be read before a replay. A replay runs the list, without Python: numbers
that Python read while capturing are frozen, memory that was freed since raises, and all memory of the pool that
was free while it was captured is overwritten, which whoever reads it later is told.

A capture that fails leaves behind what PyTorch's own leaves: a pool that goes on recording, the stream of the
capture as the current one, and (`streams.GENERATOR_STAYS_CAPTURED`, as in torch 2.11) a generator in capture mode.

Only operators that the dispatcher sees are followed: backend="eager" or "aot_eager", not "inductor". No kernel of
CUDA runs, nothing is timed, and the default is to note hazards that a GPU would let pass, not to raise.
"""
