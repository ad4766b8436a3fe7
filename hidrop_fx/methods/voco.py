"""VoCo-LLaMA: text sees an image through a few tokens between the two, whose keys and values are all that is cached of it."""

from hidrop_fx.methods.published import Fields, register_method, required


@register_method(
    "voco",
    source="VoCo-LLaMA, CVPR 2025; github.com/Yxxxb/VoCo-LLaMA",
    summary="text behind the tokens `token_id` sees nothing before the first of them, and caches begin there",
    trains=True,
)
def voco(*, token_id: int = 32000) -> Fields:
    """Let the tokens of that id, behind the image, stand for it; they are part of the prompt, and trained."""
    required(token_id=token_id)
    return {"bottleneck": token_id}
