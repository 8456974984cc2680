"""Tensors are given as addresses; `bfloat16` says what their numbers are, 0 float32 or 1 bfloat16."""

instruction_set: str

def add_norm(
    bfloat16: int, x: int, delta: int, weight: int, out: int, rows: int, width: int, eps: float, /
) -> None: ...
def gate(bfloat16: int, gate_up: int, out: int, rows: int, width: int, /) -> None: ...
def rotate_and_write(
    bfloat16: int,
    fused: int,
    cos: int,
    sin: int,
    query_norm: int,
    key_norm: int,
    queries: int,
    keys: int,
    values: int,
    positions: int,
    cells: int,
    rows: int,
    query_rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    eps: float,
    /,
) -> None: ...
def attend(
    bfloat16: int,
    queries: int,
    keys: int,
    values: int,
    out: int,
    first_rows: int,
    sizes: int,
    visible: int,
    starts: int,
    seats: int,
    in_run: int,
    aliased: int,
    cells: int,
    spans: int,
    longest_span: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    plane: int,
    num_cells: int,
    table_room: int,
    scale: float,
    /,
) -> None: ...
def summarise(bfloat16: int, logits: int, out: int, rows: int, vocab: int, /) -> None: ...
def draw(
    bfloat16: int, logits: int, peaks: int, temperatures: int, keys: int, tokens: int, rows: int, vocab: int, /
) -> None: ...
