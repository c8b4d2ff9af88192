"""Images and text: models that write text after images, as LLaVA, Qwen2-VL and Gemma 3.

``mptk prune MODEL --data CHATS`` cuts the vision tower and the language model together, and ``mptk generate DIR TEXT
--image FILE`` asks the result. docs/how-to/vision-language.md shows it.

``task``: the kind of model. ``form``: its graphs. ``inputs``: images with text; ``image_forms``: what a class wants of
images. ``command``: ``--image``.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "image_text",
    "cut models that write text after images",
    page="docs/how-to/vision-language.md",
    options=["mptk.features.image_text.command"],
    tasks={"image-text-to-text": "mptk.features.image_text.task:IMAGE_TEXT"},
)
