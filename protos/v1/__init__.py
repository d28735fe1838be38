"""Generated code of protobuf package `expertmesh.v1`."""
