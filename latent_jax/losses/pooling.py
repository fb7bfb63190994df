"""Pooling of an image's visual tokens to a fixed grid."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def adaptive_pool(
    features: Float[Array, "M Z"],
    token_image: Int[Array, " M"],
    token_row_col: Int[Array, "M 2"],
    image: Int[Array, " E"],
    grid: Int[Array, "E 2"],
    side: int,
) -> Float[Array, "E {side}*{side} Z"]:
    """Average the tokens of each example's image into side x side = S bins, row-major; torch's AdaptiveAvgPool2d rule.

    Of n rows, bin i covers floor(i n / side) up to but not with ceil((i + 1) n / side): bins share a row where side
    does not divide n, none is left out, and with n < side rows are repeated. Columns likewise.

    features: visual tokens in any order, merged ones or the encoder's; token_image: whose image each is, 0 = padding;
    token_row_col: its place in that image's grid of grid[e] rows and columns, all of which are there once.
    image: the image of each example, 0 = none, whose result is zeros. Float32 (float64 for float64 features).
    Shapes are static, so it can be vmapped over groups. Memory E * side^2 * M.
    """
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    own = (token_image[None, :] == image[:, None]) & (image[:, None] > 0)
    in_row, height = _bins(token_row_col[:, 0], grid[:, 0], side)
    in_column, width = _bins(token_row_col[:, 1], grid[:, 1], side)
    member = (in_row & own[:, None])[:, :, None] & in_column[:, None]
    # 0 * NaN is NaN: padding must not meet the sum. Zeros and ones are exact in bfloat16, so that only the accumulation
    # matters, and that is float32; dividing by the area comes after it.
    features = jnp.where(token_image[:, None] > 0, features, 0)
    member = member.reshape(len(image), side * side, -1).astype(features.dtype)
    sums = jnp.einsum("ESM,MZ->ESZ", member, features, preferred_element_type=dtype, precision="highest")
    area = jnp.maximum(height[:, :, None] * width[:, None, :], 1)  # an example without an image may have a 0 x 0 grid
    return sums / area.reshape(len(image), side * side, 1).astype(dtype)


def _bins(
    token: Int[Array, " M"], size: Int[Array, " E"], side: int
) -> tuple[Bool[Array, "E {side} M"], Int[Array, "E {side}"]]:
    """Which tokens lie in each bin of a line of `size` cells, and how many cells it has."""
    index = jnp.arange(side)
    start = index * size[:, None] // side
    end = -(-(index + 1) * size[:, None] // side)
    return (token >= start[..., None]) & (token < end[..., None]), end - start
