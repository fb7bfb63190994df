"""The chat layout of Qwen2.5-VL as a Jinja template: what it renders equals what the published template renders."""

# Whitespace is controlled by the tags themselves, so that any trim_blocks / lstrip_blocks setting renders the same.
CHAT_TEMPLATE = r"""
{%- set seen = namespace(images=0, videos=0) -%}
{%- set newline = "\n" -%}
{%- if messages and messages[0]["role"] != "system" -%}
    {{- "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message["role"] ~ newline -}}
    {%- if message["content"] is string -%}
        {{- message["content"] -}}
    {%- else -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "image" or "image" in part or "image_url" in part -%}
                {%- set seen.images = seen.images + 1 -%}
                {%- if add_vision_id -%}{{- "Picture " ~ seen.images ~ ": " -}}{%- endif -%}
                {{- "<|vision_start|><|image_pad|><|vision_end|>" -}}
            {%- elif part["type"] == "video" or "video" in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {%- if add_vision_id -%}{{- "Video " ~ seen.videos ~ ": " -}}{%- endif -%}
                {{- "<|vision_start|><|video_pad|><|vision_end|>" -}}
            {%- elif "text" in part -%}
                {{- part["text"] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- "<|im_end|>" ~ newline -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n" -}}
{%- endif -%}
""".strip()
