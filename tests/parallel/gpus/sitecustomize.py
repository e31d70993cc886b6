"""On PYTHONPATH of a run (a folder on it is what an interpreter looks into first): accelerate takes a gloo group on CPUs for
one on GPUs, so that its FSDP2 and its meshes run in CI. Only in ranks; a launcher needs none of it."""

import os

if "RANK" in os.environ:
    import accelerate.state as state
    from accelerate.utils import DistributedType

    def _initialise(self, *args, initialise=state.PartialState.__init__, **kwargs):
        initialise(self, *args, **kwargs)
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = _initialise
