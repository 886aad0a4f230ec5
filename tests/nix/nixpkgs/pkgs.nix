# Packages that this host's own programs build: no compiler, no download, a second at most.
let
  lib = import ./lib.nix;
  runCommand =
    name: env: script:
    derivation (
      removeAttrs env [
        "nativeBuildInputs"
        "passthru"
      ]
      // {
        inherit name;
        system = "x86_64-linux";
        builder = "/bin/sh";
        args = [
          "-euc"
          script
        ];
        PATH = "/usr/bin:/bin:/usr/sbin:/sbin";
      }
    )
    // (env.passthru or { });
  package =
    name:
    runCommand name { } ''
      mkdir -p $out/bin
      printf '#!/bin/sh\necho stand-in for ${name}\n' >$out/bin/${name}
      chmod +x $out/bin/${name}
    ''
    // {
      meta.mainProgram = name;
    };
  # every package that the rendered flake may name: one that is not here is a mistake, or new
  packages = lib.genAttrs [
    "age"
    "apacheHttpd"
    "audit"
    "autoPatchelfHook"
    "bash"
    "claude-code-router"
    "coreutils"
    "curl"
    "e2fsprogs"
    "findutils"
    "git"
    "grafana"
    "jq"
    "mtail"
    "nixfmt"
    "nixfmt-tree"
    "openssh"
    "openssl"
    "postgresql_17"
    "qemu"
    "qemu-utils"
    "shadow"
    "sops"
    "unzip"
    "util-linux"
    "yq-go"
    "zlib"
  ] package;
  pkgs = packages // {
    inherit lib runCommand;
    # the names that nixpkgs' python3Packages has of what the dispatcher needs
    python3.withPackages =
      choose:
      package "python3-with-${
        toString (
          builtins.length (
            choose (
              lib.genAttrs [
                "fastapi"
                "httptools"
                "opentelemetry-exporter-otlp-proto-http"
                "opentelemetry-sdk"
                "prometheus-client"
                "pydantic"
                "python-jsonpath"
                "pyyaml"
                "uvicorn"
                "uvloop"
              ] package
            )
          )
        )
      }";
    stdenv = {
      cc.cc = package "gcc";
      # what it is made of must be there by name; its source is not, but in the test that has one
      mkDerivation =
        attrs:
        builtins.deepSeq (map (input: input.drvPath) (
          [ attrs.src ] ++ attrs.nativeBuildInputs ++ attrs.buildInputs
        )) (package attrs.pname);
    };
    path = ./.;
    callPackage = file: args: import file ({ inherit pkgs; } // args);
    writeText = name: text: runCommand name { inherit text; } ''printf %s "$text" >$out'';
    writeShellScript =
      name: text:
      runCommand name { inherit text; } ''
        printf '#!/bin/bash\n%s\n' "$text" >$out
        chmod +x $out
      '';
    writeShellScriptBin =
      name: text:
      runCommand name { inherit text; } ''
        mkdir -p $out/bin
        printf '#!/bin/bash\n%s\n' "$text" >$out/bin/${name}
        chmod +x $out/bin/${name}
      '';
    closureInfo =
      { rootPaths }:
      runCommand "closure-info" { inherit rootPaths; } ''
        mkdir $out
        printf '%s\n' $rootPaths >$out/store-paths
      '';
    mkShellNoCC = { packages }: runCommand "shell" { inherit packages; } "echo >$out";
    testers.runNixOSTest =
      test:
      let
        made = test { inherit lib pkgs; };
      in
      runCommand "vm-test-run-${made.name}" { inherit (made) testScript; } "echo >$out";
  };
in
pkgs
