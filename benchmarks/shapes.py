"""The feature maps that are benchmarked: stages of real networks, and the shapes of the project's CPU figures."""

# Channels and side of the maps behind VGG16's blocks (the first before its pool) and ResNet-50's stages, at 224 x 224.
VGG16_STAGES = ((64, 224), (64, 112), (128, 56), (256, 28), (512, 14), (512, 7))
RESNET50_STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
BATCHES = (32, 256)

CPU_SHAPES = ((8, 64, 112, 112), (8, 256, 56, 56), (8, 512, 28, 28))
CPU_THREADS = 2
QUICK_CPU_SHAPES = ((2, 64, 28, 28),)

# Bytes are counted in S = bytes of x, so a small map does; only the ratio of pixels to channels and frame matters.
IO_SHAPE = (1, 64, 56, 56)
QUICK_IO_SHAPE = (1, 64, 8, 8)

AOT_SHAPE = (8, 64, 56, 56)
OVERHEAD_SHAPE = (1, 8, 8, 8)
GATE_OVERHEAD_SHAPE = (1, 16, 8, 8)  # of gates that reduce 16 channels to one


def stages() -> list[tuple[int, int, int, int]]:
    """Every stage of both networks at every batch size, small batches first, and the large maps among them."""
    maps = dict.fromkeys((*VGG16_STAGES, *RESNET50_STAGES))
    shapes = [(batch, channels, side, side) for batch in BATCHES for channels, side in maps]
    return sorted(shapes, key=lambda shape: (shape[0], -shape[1] * shape[2] * shape[3]))
