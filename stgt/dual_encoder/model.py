"""A dual encoder of images and texts from transformers, applied to videos.

Frames are encoded one by one; a video's embedding is the normalized mean of the normalized frame
embeddings, the parameter-free pooling of CLIP4Clip (https://arxiv.org/abs/2104.08860). The order of
frames therefore does not matter.

Legend: B videos, N texts, T frames, E shared embedding, S text tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from stgt.compilation import compile_each
from stgt.dual_encoder.config import DualEncoderConfig
from stgt.inputs.tokenizer import TextTokens
from stgt.interface.model import Embedded, Texts, VideoTextModel

if TYPE_CHECKING:
    from stgt.interface.inputs import TextTokenizer


class DualEncoder(VideoTextModel):
    """CLIP or SigLIP as a video-language model. Weights are random until they are loaded."""

    def __init__(self, config: DualEncoderConfig, tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

        self.config: DualEncoderConfig = config
        self.tokenizer = tokenizer
        values = config.hub
        self.hub: Any
        if values["model_type"] == "clip":
            self.hub = CLIPModel(CLIPConfig(**values))
        else:
            self.hub = SiglipModel(SiglipConfig(**values))
            # The bias of SigLIP's sigmoid loss; the contrastive loss has none.
            self.hub.logit_bias.requires_grad_(False)
        if config.gradient_checkpointing:
            self.hub.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def temperature(self) -> torch.Tensor:  # type: ignore[override]
        """Scalar: the reciprocal of the factor that the model was trained with."""
        return (-self.hub.logit_scale.float()).exp().reshape(())

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """One embedding of a video, and its width E."""
        hub = self.config.hub
        if hub["model_type"] == "clip":
            return 1, int(hub["projection_dim"])
        return 1, int(hub["vision_config"]["hidden_size"])

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode each frame as one token [B, T, 1, E]."""
        frames = self.checked_frames(frames)
        found = self.hub.get_image_features(pixel_values=frames.flatten(0, 1)).pooler_output
        return found.unflatten(0, frames.shape[:2]).unsqueeze(2)

    def relate_frames(self, frame_tokens: torch.Tensor) -> torch.Tensor:
        """Return the frame embeddings [B, T, E] as they are: frames are not related."""
        return frame_tokens.flatten(1, 2)

    def embed_videos(self, video_tokens: torch.Tensor) -> torch.Tensor:
        """Return [B, 1, E] float: the normalized mean of normalized frame embeddings [B, T, E]."""
        frames = F.normalize(video_tokens.float(), dim=-1)
        return F.normalize(frames.mean(dim=1, keepdim=True), dim=-1)

    def embed(self, video_tokens: torch.Tensor, text: TextTokens) -> Embedded:
        """Compute the embeddings of pairs, in training."""
        return Embedded(self.embed_videos(video_tokens), self.encode_text(text))

    def encode_text(self, texts: Texts) -> torch.Tensor:
        """Encode captions as unit-length embeddings [N, E] float.

        Raises:
            ValueError: There are no texts, the tokens are malformed, or they have a length that the
                model was not trained with.
        """
        words = int(self.config.hub["text_config"]["vocab_size"])
        text = self.checked_tokens(self.tokenizer, texts, words)
        length = text.input_ids.shape[1]
        if self.config.pads_fully and length != self.config.most_text_tokens:
            raise ValueError(
                f"texts: got {length} tokens, but {self.config.title} takes texts padded to "
                f"{self.config.most_text_tokens}"
            )
        mask = None if self.config.pads_fully else text.attention_mask
        found = self.hub.get_text_features(input_ids=text.input_ids, attention_mask=mask)
        return F.normalize(found.pooler_output.float(), dim=-1)

    def compile_blocks(self, cuda_graphs: bool = False) -> None:
        """Compile the layers of both towers with torch.compile."""
        for tower in (self.hub.vision_model, self.hub.text_model):
            compile_each(tower.encoder.layers)
