"""What `growkit.ops.kron` calls: `plan` orders an expansion by counted cost, `expand` runs it."""
