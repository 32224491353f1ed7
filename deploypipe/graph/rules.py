"""The table: aten operation -> what it does to channel labels. An operation without a row is decomposed, else frozen."""

import torch

from deploypipe.graph.movement import by_position, cat, chunk, expand, glu, index, move, pad_constant, slice_, split
from deploypipe.graph.norms import group_norm, layer_norm, per_channel_norm
from deploypipe.graph.pointwise import elementwise, overwrite, same, unlabelled
from deploypipe.graph.reductions import along_axis, attention, grid_sample, over_space, reads_values, reduce, unfold
from deploypipe.graph.reshape import channel_shuffle, pixel_shuffle, pixel_unshuffle, reshape
from deploypipe.graph.tracer import Rule
from deploypipe.graph.weighted import WEIGHTED


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **WEIGHTED,
    **_rows(
        elementwise,
        "hardswish hardswish_ _prelu_kernel log_sigmoid rrelu hardsigmoid_ native_dropout fake_quantize_per_tensor_affine "
        "max.other min.other",
    ),
    **_rows(
        same,
        "dropout dropout_ feature_dropout alpha_dropout contiguous clone detach alias to _to_copy type_as requires_grad_ "
        "zeros_like ones_like empty_like full_like rand_like randn_like lift_fresh float half double bernoulli",
    ),
    **_rows(
        overwrite,
        "copy_ index_put_ index_put scatter scatter_ index_copy_ index_add_ masked_scatter slice_scatter select_scatter",
    ),
    **_rows(
        move,
        "permute transpose transpose_ t numpy_T matrix_H mT unsqueeze unsqueeze_ squeeze squeeze_ flip movedim moveaxis "
        "swapaxes swapdims repeat tile repeat_interleave atleast_2d atleast_3d rot90",
    ),
    **_rows(by_position("dim"), "select unbind narrow split_with_sizes tensor_split index_select gather"),
    "unfold": by_position("dimension"),
    "diagonal": by_position("dim1", "dim2"),
    **_rows(by_position("dims"), "roll"),
    **_rows(split, "split"),
    "slice": slice_,
    "index": index,
    "chunk": chunk,
    "glu": glu,
    **_rows(cat, "cat concat stack"),
    "constant_pad_nd": pad_constant,
    **_rows(expand, "expand expand_as broadcast_to"),
    **_rows(reshape, "view reshape flatten unflatten _unsafe_view view_as reshape_as ravel"),
    **_rows(unlabelled, "new_zeros new_ones new_empty new_full"),
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    **_rows(channel_shuffle, "channel_shuffle native_channel_shuffle"),
    **_rows(
        over_space(1),
        "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d "
        "reflection_pad1d replication_pad1d lp_pool1d",
    ),
    **_rows(
        over_space(2),
        "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa reflection_pad2d replication_pad2d fractional_max_pool2d",
    ),
    **_rows(
        over_space(3),
        "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
        "upsample_trilinear3d reflection_pad3d replication_pad3d",
    ),
    **_rows(grid_sample, "grid_sampler grid_sampler_2d"),
    "im2col": unfold,
    **_rows(
        reduce,
        "mean sum amax amin max min var std var_mean std_mean prod norm linalg_vector_norm logsumexp argmax argmin any all "
        "median",
    ),
    **_rows(along_axis, "softmax _softmax log_softmax _log_softmax cumsum cumprod sort argsort topk softmin"),
    **_rows(attention, "scaled_dot_product_attention _native_multi_head_attention _transformer_encoder_layer_fwd"),
    **_rows(reads_values, "item _local_scalar_dense is_nonzero equal allclose nonzero masked_select unique"),
    "batch_norm": per_channel_norm,
    "instance_norm": per_channel_norm,
    **_rows(layer_norm, "layer_norm rms_norm"),
    "group_norm": group_norm,
}


MOVES = frozenset(name for name, rule in RULES.items() if rule.__module__ == move.__module__)  # they may replay the operation


def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """Return the rule of an aten operation: the row of its overload or name, or `elementwise` if torch tags it as pointwise.

    What has neither and works in place goes by what it is called otherwise: torch tags few of these.
    """
    name = op._schema.name.rpartition("::")[2]
    rule = RULES.get(f"{name}.{op._overloadname}") or RULES.get(name)
    if rule is not None:
        return rule
    if torch.Tag.pointwise in op.tags:
        return elementwise
    other = getattr(getattr(torch.ops.aten, name.removesuffix("_"), None), op._overloadname, None)
    return rule_for(other) if name.endswith("_") and isinstance(other, torch._ops.OpOverload) else None
