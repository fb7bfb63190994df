"""Which activations a layer keeps for its backward pass."""

from collections.abc import Callable

import jax

from latent_jax.ops import partition

POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialise(body: Callable, policy: str, looped: bool = True) -> Callable:
    """Wraps a scan body. `none` keeps everything, `dots` keeps matmul outputs, `full` only the layer's input.

    `looped`: of a scan over more than one layer, which stays a loop in the compiled program.
    """
    if policy == "none":
        if not partition.gathers():
            return body
        return jax.checkpoint(body, policy=partition.keep_all_but_gathered, prevent_cse=not looped)
    # prevent_cse is for bodies outside a loop; inside, the loop already keeps the recomputation apart.
    return jax.checkpoint(body, policy=POLICIES[policy], prevent_cse=not looped)
