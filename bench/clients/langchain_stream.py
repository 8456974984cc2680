"""langchain-openai against a server: a chat, streamed, with its usage, and many at once.

    drex serve &
    python bench/clients/langchain_stream.py http://127.0.0.1:8000/v1 drex-stdlib-10m

Needs `pip install langchain-openai`, in an environment of its own. Exit code 1 if a stream is not what the whole reply
is.
"""

from __future__ import annotations

import asyncio
import sys

from langchain_openai import ChatOpenAI


async def main(url: str, name: str) -> None:
    """Stream, and ask for the same as a whole."""
    model = ChatOpenAI(base_url=url, api_key="any", model=name, temperature=0, max_tokens=24, stream_usage=True)
    prompts = ["import os", "def add(a, b):", "class Stack:", "for line in"]
    whole = await asyncio.gather(*(model.ainvoke(prompt) for prompt in prompts))
    for prompt, expected in zip(prompts, whole, strict=True):
        chunks = [chunk async for chunk in model.astream(prompt)]
        text = "".join(str(chunk.content) for chunk in chunks)
        usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        print(f"{prompt!r}: {len(chunks)} chunks, {usage[-1]['output_tokens']} tokens, {text!r}")
        counted = sum(one["output_tokens"] for one in usage)
        if text != expected.content or counted != expected.usage_metadata["output_tokens"]:
            raise SystemExit("the stream is not what the whole reply is")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
