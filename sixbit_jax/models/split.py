"""A module taken apart once, at the edge: what compiled functions receive."""

from flax import nnx, struct


@struct.dataclass
class Split[M]:
    """A Flax NNX module as a pytree: its parameters are leaves, its graph is static.

    Passes through jit, vmap, donation and sharding like any other pytree; `merge` gives the module back inside.

    Attributes:
        params: the module's state.
        graph: the module's static definition, part of the compilation key.
    """

    params: nnx.State
    graph: nnx.GraphDef[M] = struct.field(pytree_node=False)

    @classmethod
    def of(cls, module: M) -> "Split[M]":
        """The module taken apart; parameters are not copied."""
        graph, params = nnx.split(module)
        return cls(params=params, graph=graph)

    def merge(self) -> M:
        """The module, holding the leaves of this pytree (tracers inside jit)."""
        return nnx.merge(self.graph, self.params)
