import io
import warnings

import pytest
import torch
from PIL import Image

from convmixer_hub.data.images import open_image
from convmixer_hub.figures import draw_confusion, draw_kernels, draw_predictions
from convmixer_hub.predict import Prediction


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(
    "name", ["cat", "$\\no formula$", "great white shark, white shark, man-eater"]
)
def test_predictions_are_drawn(count, name):
    red = Image.new("RGB", (32, 32), "red")
    classes = [Prediction(name, 0.9), Prediction("dog", 0.1)]
    drawn = open_image(draw_predictions([red] * count, [name] * count, [classes] * count))
    pixels = {color: number for number, color in drawn.getcolors(drawn.width * drawn.height)}
    assert pixels[255, 0, 0] > 10_000 * count


def test_long_names_are_drawn_without_a_word_on_fonts(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's, that there is little room
        draw_confusion(torch.eye(2, dtype=torch.long), ["a" * 300, "$\\no formula$"])
    assert not caplog.records


def test_kernels_are_drawn_upright_by_layer_red_above_zero():
    weights = [torch.zeros(96, 1, 3, 3) for _ in range(2)]
    weights[0][0, 0, 0, 2] = 0.1  # the upper right corner of the first kernel
    weights[1][1, 0, 2, 0] = -5  # the lower left corner of the second one
    with Image.open(io.BytesIO(draw_kernels(weights))) as image:
        rgb = image.convert("RGB")
    assert rgb.height == 2 * 42 + 3 * 4
    (red, _, _), (_, _, blue) = rgb.getpixel((60 + 40, 4 + 2)), rgb.getpixel((60 + 48, 50 + 40))
    assert 170 < red < 190 and 170 < blue < 190
    assert rgb.getpixel((60 + 2, 4 + 40)) == (255, 255, 255)
