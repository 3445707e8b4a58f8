import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from vit_jax.data.transforms import augment, crops, language
from vit_jax.data.transforms.language import normalize, parse_transform
from vit_jax.data.transforms.resize import resize
from vit_jax.system.errors import UserError


def array(image):
    return np.asarray(image).astype(int)


def test_resize_goes_straight_to_a_size_that_need_not_be_square(photo):
    out = parse_transform("resize", (30, 50))(photo)
    np.testing.assert_array_equal(array(out), array(resize(photo, (30, 50), "bilinear")))
    for spec in ("resize('bicubic')", "resize(method='bicubic')", ' resize( "bicubic" ) '):
        out = parse_transform(spec, (30, 50))(photo)
        np.testing.assert_array_equal(array(out), array(resize(photo, (30, 50), "bicubic")))


def test_resize_and_crop_of_the_few_shot_evaluation(photo):
    out = parse_transform("resize(size=48)|center_crop", (32, 32))(photo)
    expected = resize(photo, (48, 48), "bilinear").crop((8, 8, 40, 40))
    np.testing.assert_array_equal(array(out), array(expected))


@pytest.mark.parametrize(
    ("size", "shorter", "expected"),
    [
        ((375, 500), 256, (256, 341)),
        ((500, 333), 256, (384, 256)),
        ((10, 14), 5, (5, 7)),
        ((30, 30), 60, (60, 60)),
    ],
)
def test_resize_shorter_keeps_the_aspect(size, shorter, expected):
    image = Image.new("RGB", size[::-1])
    out = language.OPS["resize_shorter"].function(image, None, (1, 1), shorter)
    assert (out.height, out.width) == expected


def test_resize_shorter_takes_a_method(photo):
    for method in ("area", "bicubic", "bilinear"):
        out = parse_transform(f"resize_shorter(40, '{method}')|center_crop", (40, 40))(photo)
        expected = resize(photo, (40, 60), method).crop((10, 0, 50, 40))
        np.testing.assert_array_equal(array(out), array(expected))


def test_center_crop_rounds_towards_the_top_left(photo):
    out = parse_transform("center_crop", (33, 57))(photo)  # of 80 x 120
    np.testing.assert_array_equal(array(out), array(photo)[23:56, 31:88])


@pytest.mark.parametrize(
    ("spec", "sample", "method"),
    [
        ("inception_crop", crops.sample_inception_box, "bilinear"),
        ("random_resized_crop", crops.sample_resized_box, "bicubic"),
    ],
)
def test_random_crops_are_cut_and_resized(photo, spec, sample, method):
    for seed in range(5):
        out = parse_transform(spec, (24, 40))(photo, np.random.default_rng(seed))
        top, left, h, w = sample(np.random.default_rng(seed), 80, 120)
        cut = photo.crop((left, top, left + w, top + h))
        np.testing.assert_array_equal(array(out), array(resize(cut, (24, 40), method)))


def test_random_crops_take_bounds_and_methods(photo):
    whole = parse_transform("inception_crop(1, 1.0, 'area')", (8, 8))
    square = photo.resize((64, 64))
    for seed in range(20):  # only the whole square has its whole area
        out = whole(square, np.random.default_rng(seed))
        np.testing.assert_array_equal(array(out), array(resize(square, (8, 8), "area")))
    small = parse_transform("random_resized_crop(scale_min=0.01, scale_max=0.01)", (8, 8))
    assert small(photo, np.random.default_rng(0)).size == (8, 8)


def test_flip_mirrors_every_other_time(photo):
    flip = parse_transform("flip", (80, 120))
    mirrored = array(ImageOps.mirror(photo))
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        out = array(flip(photo, rng))
        if (out == mirrored).all():
            flipped += 1
        else:
            np.testing.assert_array_equal(out, array(photo))
    assert 160 < flipped < 240


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_shift_is_a_crop_of_the_padded_image(mode):
    image = Image.fromarray(np.arange(1, 31, dtype=np.uint8).reshape(5, 6)).convert(mode)
    padded = np.pad(array(image), [(2, 2), (2, 2)] + [(0, 0)] * (mode == "RGB"))
    crops = {
        padded[t : t + 5, left : left + 6].tobytes() for t in range(5) for left in range(5)
    }
    rng = np.random.default_rng(0)
    shift = parse_transform("shift(2)", (5, 6))
    assert {array(shift(image, rng)).tobytes() for _ in range(600)} == crops


def test_steps_run_from_left_to_right(photo):
    """`flip` after `resize`, and `randaugment` at the end, at the final size."""
    spec = "inception_crop(0.05, 1.0)|flip|randaugment(2, 10)"
    one = parse_transform(spec, (32, 32))(photo, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    step = photo
    for part in spec.split("|"):
        step = parse_transform(part, (32, 32))(step, rng)
    np.testing.assert_array_equal(array(one), array(step))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("spec", "function", "arguments"),
    [
        ("randaugment(2, 15)", augment.randaugment, (2, 15)),
        ("randaugment(2, 15, quirks=True)", augment.randaugment, (2, 15, True)),
        ("randaugment_timm", augment.randaugment_timm, ()),
        ("randaugment_timm(3, 7, 0, False, 1)", augment.randaugment_timm, (3, 7, 0, False, 1)),
        ("three_augment", augment.three_augment, ()),
        ("color_jitter(0.3, 0.2, 0.1)", augment.color_jitter, (0.3, 0.2, 0.1)),
        ("color_jitter(2, 0, 0, hue=0.5)", augment.color_jitter, (2, 0, 0, 0.5)),
        ("grayscale(0.5)", augment.grayscale, (0.5,)),
        ("gaussian_blur(0.5, 1, 3)", augment.gaussian_blur, (0.5, 1, 3)),
        ("solarize(0.9, threshold=256)", augment.solarize, (0.9, 256)),
        ("random_erasing(0.5)", augment.random_erasing, (0.5,)),
        ("random_erasing(1, mode='const')", augment.random_erasing, (1, "const")),
    ],
)
def test_distortions_are_those_of_augment(photo, spec, function, arguments, mode):
    image = photo.convert(mode)
    transform = parse_transform(spec, (80, 120))
    for seed in range(5):
        out = transform(image, np.random.default_rng(seed))
        expected = function(image, np.random.default_rng(seed), *arguments)
        np.testing.assert_array_equal(array(out), array(expected))


@pytest.mark.parametrize("name", [name for name, op in language.OPS.items() if op.random])
def test_the_reference_lists_every_operation_with_its_defaults(name):
    parameters = language.OPS[name].parameters
    usage = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )
    expected = f"{name}({usage})" if parameters else name
    assert expected in parse_transform.__doc__


def test_transforms_can_be_pickled_and_print_their_spec():
    transform = parse_transform("resize|flip", (8, 8))
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert (transform.spec, transform.image_size) == ("resize|flip", (8, 8))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "resise",
            r"unknown transform 'resise' \(did you mean 'resize'\?\): use resize, resize_sh",
        ),
        ("crop|flip", "unknown transform 'crop'"),
        ("resize_shorter", "missing a required argument: 'size'; write resize_shorter"),
        ("resize_shorter(256, 'area', 3)", "too many positional arguments"),
        ("flip(0.5)", "too many positional arguments"),
        ("randaugment(layers=2, power=3)", "power|magnitude"),
        ("resize('bilinaer')", "method cannot be 'bilinaer'; .* among bilinear, area"),
        ("inception_crop(-0.1)", "area_min cannot be -0.1"),
        ("inception_crop(5, 100)", "area_max cannot be 100"),
        ("inception_crop(0.9, 0.5)", "area_min cannot be 0.9"),
        ("resize_shorter(0)", "size cannot be 0"),
        ("inception_crop(0.1, 'all')", "area_max cannot be 'all'"),
        ("randaugment(2, 10, quirks=1)", r"quirks cannot be 1; write randaugment\(layers"),
        ("randaugment(2, 10, quirks='yes')", "quirks cannot be 'yes'"),
        ("randaugment(-1, 10)", "layers cannot be -1"),
        ("randaugment(2, 1e999)", "magnitude cannot be inf"),
        ("randaugment_timm(probability=1.1)", "probability cannot be 1.1"),
        ("randaugment_timm(std=-0.5)", "std cannot be -0.5"),
        ("color_jitter(0.4)", "missing a required argument: 'contrast'"),
        ("color_jitter(0.4, 0.4, 0.4, 0.6)", "hue cannot be 0.6"),
        ("gaussian_blur(sigma_min=3)", "sigma_min cannot be 3"),
        ("gaussian_blur(sigma_min=0)", "sigma_min cannot be 0"),
        ("solarize(threshold=300)", "threshold cannot be 300"),
        ("random_erasing(0.25, 'noise')", "mode cannot be 'noise'; .* among pixel, rand, con"),
        ("random_erasing", "missing a required argument: 'probability'"),
        ("three_augmet", r"unknown transform 'three_augmet' \(did you mean 'three_augment'"),
        ("shift(1.5)", "pixels cannot be 1.5"),
        ("shift(True)", "pixels cannot be True"),
        ("randaugment('2', 10)", "layers cannot be '2'"),
        ("resize(", "is not understood"),
        ("resize()()", "is not understood"),
        ("__import__('os').system('true')", "is not understood"),
        ("resize(size=open('x'))", "is not understood"),
        ("resize(**{'size': 3})", "unexpected keyword argument"),
        ("resize||flip", "is not understood"),
        ("3", "is not understood"),
    ],
)
def test_mistakes_are_explained(spec, message):
    with pytest.raises(UserError, match=message):
        parse_transform(spec, (8, 8))


@pytest.mark.parametrize(
    "spec", ["", "flip", "resize_shorter(32)", "center_crop|resize_shorter(9)"]
)
def test_a_wrong_final_size_says_what_to_add(photo, spec):
    with pytest.raises(UserError, match=r"where 32 x 40 is needed; add resize"):
        parse_transform(spec, (32, 40))(photo, np.random.default_rng(0))


def test_a_crop_larger_than_the_image_is_explained(photo):
    with pytest.raises(
        UserError, match=r"at least 100 x 100, but got 80 x 120; put resize_shorter"
    ):
        parse_transform("center_crop", (100, 100))(photo)


@pytest.mark.parametrize(
    "spec", ["flip", "shift(1)", "inception_crop", "randaugment(1, 1)", "grayscale"]
)
def test_random_steps_are_refused_in_evaluation(photo, spec):
    with pytest.raises(UserError, match="is random and cannot be part of an evaluation"):
        parse_transform(spec, (80, 120))(photo)


def test_inception_range_is_minus_one_to_one():
    images = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
    out = jax.jit(normalize, static_argnums=1)(images, "inception")
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out.ravel(), [-1, -0.6, 1], atol=1e-6)


def test_imagenet_range_is_that_of_torchvision():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 5, 3), np.uint8)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(jnp.asarray(images), "imagenet"), expected, atol=1e-5)


def test_ranges_that_do_not_fit_are_explained():
    grey = jnp.zeros((1, 2, 2, 1), jnp.uint8)
    with pytest.raises(UserError, match="is for 3 channels, but the images have 1; use 'incep"):
        normalize(grey, "imagenet")
    with pytest.raises(
        UserError, match="unknown value range 'clip'; use inception or imagenet"
    ):
        normalize(grey, "clip")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("resize_shorter(256, method='area')|center_crop",
         "resize_shorter(438, method='area')|center_crop"),
        ("resize(method='bicubic', size=256)|center_crop",
         "resize(method='bicubic', size=438)|center_crop"),
        ("resize(method='bilinear_antialias')", "resize(method='bilinear_antialias')"),
        ("resize_shorter(size=248)|center_crop", "resize_shorter(size=425)|center_crop"),
    ],
)  # fmt: skip
def test_a_transform_for_another_size_keeps_the_share_of_its_crop(spec, expected):
    assert language.rescale(spec, (224, 224), (384, 384)) == expected


# ---- sizes that need not be square, and crops of smaller images --------------------------


def test_resize_takes_a_rectangle(photo):
    out = parse_transform("resize('bicubic', size=(40, 60))|center_crop", (32, 48))(photo)
    assert out.size == (48, 32)
    whole = parse_transform("resize('bicubic', (40, 60))", (40, 60))(photo)
    assert whole.size == (60, 40)
    box = (6, 4, 54, 36)
    np.testing.assert_array_equal(array(out), array(whole.crop(box)))


@pytest.mark.parametrize(
    ("size", "fit", "expected"),
    [
        ((40, 30), "cover", (40, 60)),  # the photo is 80 x 120
        ((40, 30), "inside", (20, 30)),
        (40, "cover", (40, 60)),
        (40, "inside", (27, 40)),
        ((10, 120), "cover", (80, 120)),
    ],
)
def test_resize_fit_keeps_the_aspect(photo, size, fit, expected):
    assert photo.size == (120, 80)
    out = parse_transform(f"resize_fit({size}, fit='{fit}')", expected)(photo)
    assert (out.height, out.width) == expected


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("fill", [0, 7])
def test_a_crop_fills_what_a_smaller_image_lacks(mode, fill):
    image = Image.fromarray(np.full((3, 6), 200, np.uint8)).convert(mode)
    out = array(parse_transform(f"center_crop(fill={fill})", (6, 4))(image))
    expected = np.full((6, 4), fill, np.uint8)
    expected[1:4] = 200  # a line above, two below
    np.testing.assert_array_equal(out[..., 0] if mode == "RGB" else out, expected)
    with pytest.raises(UserError, match="needs an image of at least 6 x 4"):
        parse_transform("center_crop", (6, 4))(image)


def test_a_crop_fills_with_a_colour(photo):
    out = array(parse_transform("center_crop(fill=(1, 2, 3))", (100, 120))(photo))
    assert tuple(out[0, 0]) == (1, 2, 3)
    grey = photo.convert("L")
    with pytest.raises(UserError, match="a colour of 3 channels, not 1"):
        parse_transform("center_crop(fill=(1, 2, 3))", (100, 120))(grey)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resize(size=(3, 4, 5))", "size cannot be"),
        ("resize(size=(0, 4))", "size cannot be"),
        ("resize(size=2.5)", "size cannot be"),
        ("resize_shorter((3, 4))", "size cannot be"),
        ("resize_fit(0)", "size cannot be 0"),
        ("resize_fit(9, fit='around')", "a fit among cover, inside"),
        ("resize('bicubic', rounding='floor')", "rounding cannot be 'floor'"),
        ("resize_shorter(9, 'area', rounding='up')", "a rounding among nearest, floor"),
        ("center_crop(fill=256)", "fill cannot be 256"),
        ("center_crop(fill=(0, 'red'))", "fill cannot be"),
    ],
)
def test_mistakes_in_the_new_arguments_are_explained(spec, message):
    with pytest.raises(UserError, match=message):
        parse_transform(spec, (8, 8))


def test_rescaling_of_rectangles_and_fits():
    old, new = (224, 224), (112, 112)
    assert language.rescale("resize('bicubic', size=(256, 240))|center_crop", old, new) == (
        "resize('bicubic', size=(128, 120))|center_crop"
    )
    assert language.rescale("resize_fit((256, 240))|center_crop(fill=8)", old, new) == (
        "resize_fit((128, 120))|center_crop(fill=8)"
    )
