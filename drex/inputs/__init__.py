"""From what a user sends to requests that the engine takes: prompts, tokenisers, sampling defaults."""
