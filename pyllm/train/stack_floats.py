"""What a tape takes for one stack of blocks, an encoder's or a decoder's, in floats."""

from __future__ import annotations

from dataclasses import dataclass

from pyllm.spec import AttentionSpec, BlockSpec, ModelSpec, Placement


@dataclass(frozen=True)
class Part:
    """Floats of what is computed together: values and gradients."""

    values: int
    gradients: int

    def __add__(self, other: Part) -> Part:
        """Both, which are there at once."""
        return Part(self.values + other.values, self.gradients + other.gradients)


@dataclass(frozen=True)
class StackFloats:
    """Floats of a stack: values kept whatever is computed again, the parts of its blocks, the table of biases by
    distance, gradients before the first block, and what cross attention writes of a source."""

    kept: int
    parts: tuple[Part, ...]
    distances: int
    before: int
    written: int

    @property
    def parts_gradients(self) -> int:
        """Those of the part that takes most."""
        return max(part.gradients for part in self.parts)


def padded(columns: int, rows: int) -> int:
    """Floats of an array, up to where the next one begins."""
    return -(-columns * rows // 16) * 16


def stack_floats(spec: ModelSpec, tokens: int, source: int, dropout: bool) -> StackFloats:
    """Of embedding, blocks and final norm of `tokens` tokens, which cross attention to `source` others, if any."""

    def floats(columns: int, rows: int = tokens) -> int:
        return padded(columns, rows)

    width = floats(spec.hidden)
    branch = width if dropout else 0

    def attention(a: AttentionSpec) -> Part:
        queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
        normed = floats(queries) + floats(keys) if a.qk_norm is not None else 0
        qkv = floats(queries + 2 * keys)
        return Part(qkv + normed + floats(queries) + floats(a.heads), floats(queries) + qkv + normed)

    def cross(a: AttentionSpec) -> Part:
        queries, kv = floats(a.heads * a.head_dim), written(a)
        return Part(2 * queries + kv + floats(a.heads), 2 * queries + kv)

    def written(a: AttentionSpec) -> int:
        return floats(2 * a.kv_heads * a.head_dim, source)

    def mlp(b: BlockSpec) -> Part:
        inner, pre = floats(b.mlp.hidden), floats(b.mlp.hidden * (2 if b.mlp.gated else 1))
        return Part(inner + pre, inner)

    def parts(b: BlockSpec) -> list[Part]:
        """With the norms before them, and what is added to the residual stream where it stands by itself."""
        norm, found = Part(width, width), [attention(b.attention), mlp(b)]
        if b.cross is not None:
            found.insert(1, cross(b.cross))
        if b.placement is Placement.NORMED:
            return [Part(width, width) + part for part in found]
        if b.placement is Placement.SANDWICH:
            return [Part(3 * width, 2 * width) + part for part in found]
        found = [part + Part(branch, branch) for part in found]
        if b.placement is Placement.POST:
            return found
        if b.placement.is_parallel:
            first, second = found
            return [(norm if b.placement is Placement.SHARED else norm + norm) + first + second]
        return [norm + part for part in found]

    def streams(b: BlockSpec) -> int:
        """States of the residual stream that it makes, norms behind its parts included."""
        each = 2 if b.placement in (Placement.POST, Placement.NORMED) else 1
        return each * (2 if b.cross is None else 3)

    e = spec.embedding
    table, norms = floats(spec.table_width), 0 if e.norm is None else 1
    places = width if e.positions else 0  # where they are looked up by themselves
    if e.projects_sum:
        embedded = width + table * (1 + norms)
    else:
        embedded = width * (1 + norms)
        if e.width is not None:
            embedded += places + table * (2 if e.scale != 1 else 1) + branch
        elif e.scale != 1:
            embedded += places + width
    if e.second_positions:
        embedded += 2 * width  # what is looked up, and the sum
    angles = sum(2 * floats(rope.dim // 2) for rope in (spec.rope, spec.local_rope) if rope is not None)
    biases = spec.relative_bias
    distances = floats(2 * biases[1].max_distance + 1, biases[0]) if biases is not None else 0
    final = width if spec.final_norm is not None else 0
    return StackFloats(
        kept=embedded + angles + distances + width * sum(map(streams, spec.blocks)) + final,
        parts=tuple(part for b in spec.blocks for part in parts(b)),
        distances=distances,
        before=table + branch if e.width is not None else places if e.scale != 1 else 0,
        written=max(written(b.cross) for b in spec.blocks if b.cross is not None) if spec.encoder is not None else 0,
    )
