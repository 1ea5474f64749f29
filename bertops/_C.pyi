cpu_isa: str
with_cuda: int
