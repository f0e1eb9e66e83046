"""A plan from masks of one's own, compared with masked `scaled_dot_product_attention`; needs no weights and no GPU.

    python examples/own_masks.py

The pattern is the idea of Radial Attention: a token attends to what is near in space, the less so the farther apart in
time the frames are. Any other rule that says which tokens matter to which takes the place of `pattern`.
"""

import torch
import torch.nn.functional as F

import calibatt
from calibatt.plans import Blocks, ModelSignature, TokenGrid

GRID, BLOCKS = TokenGrid(frames=9, height=12, width=16), Blocks(block_q=32, block_k=16)


def pattern(grid: TokenGrid) -> torch.Tensor:
    """bool ``(tokens, tokens)``: which keys matter to which queries."""
    token = torch.arange(grid.tokens)
    frame, row, column = token // (grid.height * grid.width), token // grid.width % grid.height, token % grid.width
    apart = torch.hypot(*((place[:, None] - place).float() for place in (row, column)))
    return apart <= 2 / 2 ** (frame[:, None] - frame).abs()


def block_mask(keep: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """bool ``(query blocks, key blocks)``: the blocks that hold at least one of the pairs to keep."""
    rest = (0, -keep.shape[1] % blocks.block_k, 0, -keep.shape[0] % blocks.block_q)
    return F.max_pool2d(F.pad(keep.float(), rest)[None], (blocks.block_q, blocks.block_k))[0] > 0


def main() -> float:
    """The largest difference between planned and masked attention."""
    model = ModelSignature("WanTransformer3DModel", layers=2, heads=4, head_dim=64)  # or the transformer itself
    mask = block_mask(pattern(GRID), BLOCKS)
    masks = mask.expand(model.layers, model.heads, *mask.shape)  # here one for all; each head may have its own
    plan = calibatt.plan_from_masks(masks, GRID, BLOCKS, model=model, notes="examples/own_masks.py")
    # plan.save("own.plan"), or plan.attach(transformer)

    q, k, v = torch.randn(3, 1, model.heads, GRID.tokens, model.head_dim)
    planned = calibatt.planned_attention(q, k, v, plan.schedule(time=0.5, layer=0))
    seen = mask.repeat_interleave(BLOCKS.block_q, 0).repeat_interleave(BLOCKS.block_k, 1)
    masked = F.scaled_dot_product_attention(q, k, v, seen[: GRID.tokens, : GRID.tokens])
    difference = (planned - masked).abs().max().item()
    print(f"density {plan.schedule(time=0.5, layer=0).density:.3f}, largest difference {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
