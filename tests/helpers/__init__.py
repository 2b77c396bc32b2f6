"""What several tests share: small teachers, synthetic caches, servers, faults."""
