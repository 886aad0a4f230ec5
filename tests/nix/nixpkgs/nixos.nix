# What the rendered flake takes of a NixOS: a system that depends on all that was configured, and images
# that are small files.
{ modules }:
let
  lib = import ./lib.nix;
  pkgs = import ./pkgs.nix;
  base =
    { config, ... }:
    {
      system.boot.loader.kernelFile = "bzImage";
      system.boot.loader.initrdFile = "initrd";
      system.build = {
        toplevel = pkgs.runCommand "nixos-system" {
          configuration = builtins.toJSON (config // { system = null; });
          passAsFile = [ "configuration" ];
        } "mkdir $out; cp $configurationPath $out/configuration.json; echo '#!/bin/sh' >$out/init";
        kernel = pkgs.runCommand "linux" { } "mkdir $out; echo kernel >$out/bzImage";
        initialRamdisk = pkgs.runCommand "initrd" { } "mkdir $out; echo initrd >$out/initrd";
        images =
          lib.genAttrs
            [
              "amazon"
              "iso"
              "kubevirt"
              "qemu"
              "raw-efi"
              "virtualbox"
              "vmware"
            ]
            (
              format:
              pkgs.runCommand "image-${format}" { } ''
                mkdir -p $out/nix-support
                echo ${format} grub=${builtins.toJSON config.boot.loader.grub.enable} >$out/nixos.img
                echo file >$out/nix-support/hydra-build-products
              ''
              // {
                passthru = {
                  inherit config;
                  filePath = "nixos.img";
                };
              }
            );
      };
    };
in
lib.evaluate {
  modules = modules ++ [ base ];
  specialArgs = { inherit pkgs; };
}
