"""Runs the CUDA kernels, launchers and bindings of csrc/ on a CPU, to test them without a GPU.

    python -m tests.cuda_emulation            # each op case in one of three thread orders
    python -m tests.cuda_emulation --full     # in all of them

The sources are compiled by g++ as they stand. Headers under emulator/include/ stand in for CUDA's
and say what the language means on a CPU: a fiber a thread (emulator.h), a runtime of two devices
that share the CPU's memory (runtime.h), torch's CUDA guard and stream. The ops' CUDA
implementations serve CPU tensors, so that the tests of the ops run on them unchanged.

g++ is told to instrument every memory access, as for ThreadSanitizer; the calls that it makes come
to the emulator (hooks.cpp), which reports, with the line at fault,

- an access to global memory that belongs to no allocation: AddressSanitizer's allocator is loaded,
  and its shadow memory is asked;
- an access outside of a __shared__ array or the dynamic shared memory;
- a read of shared memory that no thread of the block has written;
- two threads that touch the same shared address, one of them writing, with no barrier between;
- a barrier that not every thread reaches, a warp operation whose mask names a lane that has exited
  or is elsewhere, a shuffle that reads a lane outside of its mask.

UndefinedBehaviorSanitizer stops the process at an index out of an array's bounds, an access that is
not aligned, an overflow. Workspaces and outputs are full of NaN before a kernel writes them.

Every launch is on record, with its kernel's name. If no block is run, the record of a whole
workload takes a second (test_launches.py).

Not seen: races between blocks, or on global memory; what compute-sanitizer finds on a GPU.
"""
