"""The gRPC edge: protobuf in, protobuf out.

`edge` lets calls in (auth, parsing, errors to status), by its table of who may call what;
`requests`, `replies` and `reports` translate; `inference` and `daemon_services` are the four
services; `grpc_server` binds them, with health and reflection; `tls` is what peers are shown.
`ports` says what the floors below must offer. Protobuf stops in this package.
"""
