"""The one mesh: every process has a place along each of the four axes, whatever the layout."""

from functools import cache

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cheaptrain.recipe.layout import AXES, Layout


@cache
def make_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh of `layout`, with all of `AXES` by name, sizes of 1 included. Collective: all processes make it.

    Stages of one layout share it: the groups of a mesh are never given back.
    """
    return init_device_mesh(device_type, layout.sizes, mesh_dim_names=AXES)


def data_rank(mesh: DeviceMesh) -> int:
    """Which share of the rows this process reads: 0 to dp_replicate x dp_shard - 1."""
    return mesh["dp_replicate"].get_local_rank() * mesh["dp_shard"].size() + mesh["dp_shard"].get_local_rank()
