"""The page docs/checkpoints.md, made from the tables that reading itself uses.

  python -m vit_jax.interop.checkpoints_page > docs/checkpoints.md

A test compares the two.
"""

from collections.abc import Iterable

from vit_jax.interop import huggingface, preprocessing, timm, timm_config, torchvision, wrappers
from vit_jax.interop.families import FAMILIES
from vit_jax.interop.huggingface_names import PREFIXES

HEAD = """\
# Checkpoints of others

What is read, what is obeyed and what is refused, by family and by the form of the file. This
page is made by `python -m vit_jax.interop.checkpoints_page` from the tables that reading
itself uses. Files are recognised by what is in them, never by their names; nothing in them is
executed.

What is said by a flag counts before what a file says, and that before what is assumed, which
is always said in a note. Where our model cannot hold a network exactly it is refused, with
the reason.
"""
WORDS = """\
Words before the names of a network (`module.`, `_orig_mod.`, `model.`, `backbone.`, `teacher.`
...) may be any, in any nesting: what stands before the patch embedding is one. Of averaged and
raw weights (`model_ema`, `state_dict_ema`, `ema_model.`, `teacher.`) the averaged ones are
taken, of MoCo's encoders the base encoder; a note says so, and `--weights` chooses.
"""
NAMES = """\
Ways to resize positions are those of `vit_jax/interop/resize_positions.py`, value ranges those
of `vit_jax/data/value_ranges.py`, transforms those of
`vit_jax/data/transforms/language.py`. Each of these
flags is in every command that opens weights:
"""
FORMS = (
    ("`.npz`", "Google's names; any others", "all arrays; bfloat16 as two nameless bytes"),
    ("`.safetensors`", "any names", "all arrays; what our own header says about the network"),
    (
        "PyTorch (`.pth`, `.pt`, `.bin`, `.ckpt`)",
        "any names",
        "tensors in dictionaries of any nesting, by the restricted unpickler; more in it than "
        "arrays: refused",
    ),
    (
        "Hugging Face folder",
        "`config.json` with `model_type`",
        "one file or shards with an index, `preprocessor_config.json`",
    ),
    ("timm folder", "`config.json` with `architecture`", "`model_args`, `pretrained_cfg`"),
    ("work directory, export", "`checkpoints/` or `best/`", "everything, it is ours"),
)
LAYOUTS = (
    (
        "Google, AugReg, SAM, big_vision, SigLIP's image tower",
        "ViTs, hybrids, ResNets, Mixers; old and new numbering, `opt/target/`, `params/`, "
        "`params/img/`, scanned layers",
        "a class token that is pooled with attention; hybrids of a wider ResNet",
    ),
    (
        "timm, DeiT, DeiT III, DINO, DINOv2, MAE, MoCo v3, BEiT",
        "one layout, with what each paper's code calls otherwise; DINOv2's chunks of blocks; "
        "decoders, mask tokens and projections of pre-training are left out and said",
        "{timm}",
    ),
    (
        "timm's hybrids and Mixers",
        "ResNets with weight standardisation in front",
        "other backbones",
    ),
    (
        "Hugging Face: {types}",
        "both generations of names; heads under any of {prefixes}",
        "other `model_type`s; `hidden_act` other than {gelu}; `problem_type` of a regression",
    ),
    ("torchvision", "both generations of names, `representation_size`", "convolutional stems"),
    ("OpenCLIP's image towers", "towers without `ln_pre`; `proj` becomes the head", "{clip}"),
)
SETTINGS = (
    ("`size`", "a number, `[height, width]`, `{height, width}`, `{shortest_edge}` and a crop"),
    ("`crop_size`", "a number, `[height, width]`, `{height, width}`; images that are smaller "
     "are filled with black"),
    ("`do_resize`, `do_center_crop`, `do_rescale`, `do_normalize`", "on, off; null is off"),
    ("`rescale_factor`, `image_mean`, `image_std`", "any numbers, one or one a channel"),
    ("`resample`", ", ".join(f"{i} {name}" for i, name in preprocessing.RESAMPLE.items())),
    ("another size than that of the positions", "positions are resized as transformers does"),
    ("`do_pad`, `{longest_edge}`, an edge without a crop, other processors", "refused where "
     "images are prepared: say `--transform` and `--value_range`; `convert` and `train` go on"),
)  # fmt: skip
CONFIG = (
    ("`image_size`", "a number, `[height, width]` or `{height, width}`"),
    ("`problem_type`", "single label; several labels: sigmoid, `predict --threshold`; a "
     "regression is refused"),
    ("`id2label`, `label2id`, `num_labels`", "names of classes; another number of them than "
     "the head has outputs is said, and names are left out"),
    ("`num_attention_heads`, `layer_norm_eps`, `hidden_act`", "as they are"),
)  # fmt: skip
TIMM = (
    ("`model_args.img_size`, `input_size`, `fixed_input_size`", "the shape of the positions; "
     "images of another size: positions are resized as timm does"),
    ("`crop_pct`, `crop_mode` (center, squash, border)", "as `create_transform` has it"),
    ("`interpolation`", ", ".join(timm_config._METHODS)),
    ("`mean`, `std`", "any numbers"),
    ("`num_heads`, `act_layer`, `global_pool`, `label_names`", "as they are"),
    ("`pool_include_prefix`, `label_offset`", "refused"),
    ("`crop_border_pixels`, `dynamic_img_pad`", "refused where images are prepared"),
    ("`first_conv`", "found by itself: the first layer for other channels is adapted as timm "
     "does, where `config.data.channels` or `convert --channels` ask for it"),
)  # fmt: skip
FLAGS = (
    ("`--source_image_size=HEIGHTxWIDTH`", "the pixels that positions are for, if no square"),
    ("`--num_heads=N`", "heads of attention"),
    ("`--family=NAME`", "whose code trained them: " + ", ".join(FAMILIES)),
    ("`--pool=NAME`", "how tokens become one vector: " + ", ".join(timm.POOLS)),
    ("`--weights=NAME`", "of averaged and raw ones: " + ", ".join(wrappers.WEIGHTS)),
)


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    escape = lambda text: text.replace("|", "\\|")
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(escape, row))} |" for row in lines) + "\n"


def families() -> Iterable[tuple[str, ...]]:
    for name, family in FAMILIES.items():
        yield (
            name,
            f"{family.gelu}, {family.layer_norm_eps:g}",
            family.posemb_resize,
            family.value_range,
            f"`{family.eval_transform((224, 224))}`",
        )


def layouts() -> Iterable[tuple[str, ...]]:
    words = {
        "timm": "; ".join(timm._REFUSED.values()),
        "clip": "; ".join(torchvision._REFUSED.values()),
        "types": ", ".join(f"`{name}`" for name in huggingface._FAMILY),
        "gelu": ", ".join(f"`{name}`" for name in huggingface._GELU),
        "prefixes": ", ".join(f"`{prefix}`" for prefix in PREFIXES if prefix),
    }
    for row in LAYOUTS:
        yield tuple(cell.format(**words) for cell in row)


def processors() -> Iterable[tuple[str, ...]]:
    for name, said in preprocessing.PROCESSORS.items():
        of = [model for model, kind in preprocessing.PROCESSOR_OF.items() if kind == name]
        size = preprocessing.size_of(said["size"], said["default_to_square"])
        edge = f"{size.shorter} (shorter edge)" if size.shorter else str(size.exact)
        crop = str(said["crop_size"]) if said["do_center_crop"] else "none"
        value_range = preprocessing.read_range(said, 3)
        method = preprocessing.RESAMPLE[said["resample"]]
        yield f"{name}ImageProcessor", ", ".join(of), edge, crop, method, value_range


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## Forms of files\n",
        table(("form", "recognised by", "what is read"), FORMS),
        WORDS,
        "## Layouts\n",
        table(("names of", "read", "refused"), layouts()),
        "## What a file of arrays does not say\n",
        table(
            (
                "family",
                "GELU, epsilon",
                "positions resized by",
                "value range",
                "transform, 224",
            ),
            families(),
        ),
        NAMES,
        table(("flag", "says"), FLAGS),
        "## `preprocessor_config.json`\n",
        table(("setting", "obeyed"), SETTINGS),
        "Where it is silent, the defaults of its class in transformers 5 count:\n",
        table(("class", "of", "size", "crop", "resample", "value range"), processors()),
        "## `config.json` of Hugging Face\n",
        table(("setting", "obeyed"), CONFIG),
        "## `config.json` of timm\n",
        table(("setting", "obeyed"), TIMM),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
