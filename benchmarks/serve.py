"""Throughput and time to first token of a server with OpenAI's API under load.

    jaxtrain serve MODEL --port 8000 --max-length 512 --slots 32
    python benchmarks/serve.py http://127.0.0.1:8000/v1 MODEL

Any other server is measured in the same way, for example `transformers serve MODEL --port 8001`. Each client sends one
streamed chat after another. Tokens are counted by tokenizing the texts, because servers differ in what they report.
"""

import argparse
import asyncio
import time
from statistics import quantiles

from openai import AsyncOpenAI

from converters.tokenizer import load_tokenizer

SUBJECTS = ("rivers", "bridges", "bread", "clocks", "maps", "wool", "glass", "salt", "trains", "paper", "bees", "ships")


async def answer(client, model, number, tokens):
    """Seconds to the first text, and the text, of one call."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    messages = [{"role": "user", "content": f"Tell me {number + 2} facts about {subject}."}]
    start, first, text = time.perf_counter(), None, ""
    stream = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=tokens, temperature=0, stream=True
    )
    async for piece in stream:
        new = piece.choices[0].delta.content if piece.choices else None
        if new:
            first = first or time.perf_counter() - start
            text += new
    return first or time.perf_counter() - start, text


async def measure(client, model, clients, calls, tokens):
    """Seconds of the whole load, and those to the first text and the text of each call."""

    async def one_client(begin):
        return [await answer(client, model, begin * calls + number, tokens) for number in range(calls)]

    start = time.perf_counter()
    answers = await asyncio.gather(*map(one_client, range(clients)))
    return time.perf_counter() - start, [each for own in answers for each in own]


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model", help="folder of the model, for its tokenizer")
    parser.add_argument("--name", help="of the model on the server; default: the first that it lists")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--calls", type=int, default=4, help="of each client")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    client = AsyncOpenAI(base_url=options.url, api_key="none", timeout=3600, max_retries=0)
    name = options.name or (await client.models.list()).data[0].id
    print("| clients | tokens/s | first token p50 | p99 |\n|---|---|---|---|")
    for clients in options.clients:
        await measure(client, name, clients, 1, options.tokens)  # compiles
        seconds, answers = await measure(client, name, clients, options.calls, options.tokens)
        tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for _, text in answers)
        points = quantiles([first for first, _ in answers], n=100, method="inclusive")
        print(f"| {clients} | {tokens / seconds:.1f} | {points[49]:.3f} s | {points[98]:.3f} s |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
