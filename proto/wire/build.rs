//! Compiles the protocol with a Rust protobuf compiler, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["tokenmill/step/v1/step_service.proto"], ["proto"])?;
    let transport = std::env::var_os("CARGO_FEATURE_TRANSPORT").is_some();
    let services = tonic_prost_build::configure().build_client(transport).build_server(transport);
    services.compile_fds(files)?;
    Ok(())
}
